"""A chain of two ranks on GPUs beside one process: is every bit the same, and does each rank need the memory that is forecast.

    python tools/gpu_modules.py [--out tools/tables/gpu_modules.md]

Both ranks on one device, where activations go through the host's memory; with two GPUs also one on each, where they go by NCCL. Eight
steps on random images, bfloat16 autocast, deterministic kernels. What is compared: all that a run leaves (weights, optimizer state,
averages, losses, figures). Bytes sent are those of the last epoch per step, heads of messages included. Without a GPU it says so and
measures nothing; `--dry` then trains small networks on the CPU, so that everything but the figures is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import modules_equal
import numpy as np
import timm
import torch
from machine import device, heading
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import graphopt
from graphopt import Plan
from graphopt.data.datasets import Split
from graphopt.data.loader import Data, Samples
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.supervise import Supervise
from graphopt.planning.modules import forecast_chain
from graphopt.spec import TrainSpec
from graphopt.train import train

RANKS = 2
STEPS = 8
EPOCHS = 2
COLUMNS = ("network", "batch", "devices", "activations", "values that differ", "rank", "allocated, MiB", "forecast", "sent, MB", "forecast")


class Case(NamedTuple):
    """A backbone, the size of its images, the batch, and its optimizer."""

    make: Callable[[], nn.Module]
    size: int
    batch: int
    optimizer: dict[str, Any]


SGD, ADAMW = {"name": "sgd", "lr": 0.01}, {"name": "adamw", "lr": 1e-3}
CASES = {
    "ResNet-50": Case(partial(timm.create_model, "resnet50", num_classes=10), 224, 64, SGD),
    "ViT-S": Case(partial(timm.create_model, "vit_small_patch16_224", num_classes=10, drop_path_rate=0.1), 224, 64, ADAMW),
    "Swin-T": Case(partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=10), 224, 64, ADAMW),
}
DRY = {"resnet8": Case(partial(cifar.build, "resnet8", num_classes=10), 8, 4, SGD)}


def settings(case: Case, strategy: str, where: str) -> TrainSpec:
    table = {"epochs": EPOCHS, "batch": case.batch, "optimizer": case.optimizer, "device": where, "strategy": strategy}
    return TrainSpec.model_validate({**table, "amp": "bfloat16", "ema": 0.9, "log_every": 1, "ledger": True})


def plan_of(case: Case) -> Plan:
    torch.manual_seed(0)
    shape = (3, case.size, case.size)
    return graphopt.compile(case.make(), [Supervise(modules=4 if case.size > 8 else 3)], input=shape, verify="off", costs=False)


def images(case: Case, count: int) -> Samples:
    draw = np.random.default_rng(count)
    found = [(Image.fromarray(draw.integers(0, 256, (case.size, case.size, 3), np.uint8)), n % 10) for n in range(count)]
    split = Split(found, [n for _, n in found], [str(n) for n in range(10)])
    return Samples(split, None, lambda image: pil_to_tensor(image).float() / 255, deterministic=True, seed=0)


def run(case: Case, folder: Path, strategy: str, where: str, devices: int) -> None:
    """Trains in this rank, of those that were started, on as many devices; leaves the most that it has allocated."""
    if where == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:devices]), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    data = Data(images(case, STEPS // EPOCHS * case.batch), images(case, case.batch), 10)
    train(plan_of(case), folder, settings=settings(case, strategy, where), data=data)
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
    (folder / f"peak {os.environ['RANK']}").write_text(str(peak))


def rows(name: str, case: Case, folder: Path, where: str, devices: int) -> Iterator[str]:
    """A row per rank, with one process before them."""
    dry = where == "cpu"
    for count, strategy in ((1, "auto"), (RANKS, "modules")):
        statuses = modules_equal.in_ranks(count, run, case, folder / strategy, strategy, where, devices, fork=dry, group=False)
        if any(statuses):
            raise RuntimeError(f"{name}: {count} ranks ended with {statuses}")
    chain = folder / "modules"
    different = modules_equal.differing(*(modules_equal.content(f) for f in (folder / "auto", chain)))
    way = json.loads((chain / "summary.json").read_text())["device"].partition("(modules), ")[2] or "-"
    records = [json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines()]
    sent = [of["chain"] for of in records if of["kind"] == "epoch"][-1]
    (phase,) = forecast_chain(plan_of(case), settings(case, "modules", where), ranks=RANKS, rates=modules_equal.RATES).phases
    head = f"| {name} | {case.batch} | {'-' if dry else devices} | {way} | {len(different)} |"
    for rank, forecast in [("one process", phase.alone), *((str(r.rank), r) for r in phase.ranks)]:
        alone = rank == "one process"
        peak = int((folder / "auto" / "peak 0" if alone else chain / f"peak {rank}").read_text())
        memory = f"{'-' if dry else f'{peak / 2**20:.0f}'} | {(forecast.held_bytes + forecast.link_bytes) / 2**20:.0f}"
        real = 0 if alone else sent[int(rank)]["bytes"] * EPOCHS / STEPS
        yield f"{head} {rank} | {memory} | {real / 1e6:.3f} | {forecast.sent_bytes / 1e6:.3f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="small networks on the CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    count = 0 if options.dry else torch.cuda.device_count()
    if not count and not options.dry:
        print(f"no GPU here ({device()}): nothing was measured")
        return 0
    title = "A dry run on the CPU: nothing was measured" if options.dry else "A chain of two ranks on GPUs"
    lines = [heading(title, __doc__), f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for devices in range(1, 1 + min(RANKS, max(1, count))):
        for name, case in (DRY if options.dry else CASES).items():
            with tempfile.TemporaryDirectory() as folder:
                for row in rows(name, case, Path(folder), "cpu" if options.dry else "cuda", devices):
                    lines.append(row)
                    print(row, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
