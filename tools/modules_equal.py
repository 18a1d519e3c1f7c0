"""Thirty steps on a chain of one, two and three ranks, and by one process of no strategy: every bit of what they leave is compared.

    python tools/modules_equal.py [--cases NAME ...] [--out tools/tables/modules_equal.md]

Small networks on digits, for which thirty steps take a second. Each is compiled once, in the process that all ranks are forked from.
Compared are the last checkpoint (weights, statistics of norms, heads and decoders, optimizer state, averages, decisions, history, meters,
buffers), the loss, accuracy and learning rate of every step, the figures of every epoch, and the ledger of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import small_run
import timm
import torch
import torch._dynamo  # all ranks need it, and it takes longer to load than a run takes
from machine import heading
from torch import distributed, nn
from tqdm import tqdm

import graphopt
from graphopt import Pass, Plan
from graphopt.compiler.parts import isolated_modules
from graphopt.cost import rates
from graphopt.data.loader import open_data
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train

STEPS = 30
BATCH = 4
RANKS = (1, 2, 3)
#: seconds until ranks that hang are killed
PATIENCE = 300
#: of every machine, where it does not matter which modules a rank has
RATES = rates.Rates(1e-11, 1e-10, 1e-5, 0.0, "cpu")


class Case(NamedTuple):
    """A backbone, passes, settings that differ from the usual ones, one image's shape, and augmentation."""

    make: Callable[[], nn.Module]
    passes: tuple[Pass, ...]
    settings: dict[str, Any] = {}
    shape: tuple[int, int, int] = (3, 8, 8)
    augment: dict[str, Any] = {}


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10, proj_drop_rate=0.1, drop_path_rate=0.2)


def swin() -> nn.Module:
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 2,
        "window_size": 2,
        "embed_dim": 12,
        "depths": (1, 1, 1),
        "num_heads": (1, 2, 2),
    }
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=10, drop_path_rate=0.2)


RESNET = partial(cifar.build, "resnet8", num_classes=10)
ADAMW = {"name": "adamw", "lr": 0.003}
GRAY = (1, 8, 8)
CUTS = Supervise(cuts=("stem", "one", "two"), decoder="none")
CASES = {
    "ResNet with batch norms": Case(RESNET, (Supervise(modules=3),), {"epochs": 2}),
    "ResNet, image decoders, EMA, two micro-batches, adaptive clipping": Case(
        RESNET, (Supervise(modules=3, decoder="image", head="conv"),), {"ema": 0.9, "accumulate": 2, "clip": 0.01, "clip_mode": "agc"}
    ),
    "ViT with dropout and drop path, AdamW": Case(vit, (Supervise(modules=3),), {"optimizer": ADAMW}, (3, 16, 16)),
    "Swin with drop path": Case(swin, (Supervise(balance="stage"),), shape=(3, 16, 16)),
    "bfloat16, channels last, mixup, clipped per module": Case(
        small_run.backbone,
        (CUTS,),
        {"amp": "bfloat16", "channels_last": True, "clip": 0.1, "clip_mode": "module"},
        GRAY,
        {"mixup": 0.5, "hflip": 0.5},
    ),
    "frozen, thawed, checkpoints in a thread": Case(
        small_run.backbone,
        (CUTS, Freeze(select="stem", when={"schedule": "freezeout"}), Freeze(select="one", when={"epoch": 1, "until": 2})),
        {"epochs": 3, "ema": 0.9, "optimizer": ADAMW, "checkpoint_async": True},
        GRAY,
    ),
    "frozen by score, then end to end": Case(
        small_run.backbone,
        (
            Supervise(cuts=CUTS.cuts, decoder="none", when={"epoch": 0, "until": 2}),
            Freeze(select=["stem", "one"], when={"score": "change", "below": 10.0}),
        ),
        {"epochs": 3},
        GRAY,
    ),
    "cached features": Case(small_run.backbone, (Drop(upto="one", when={"epoch": 1}, force=True), CUTS), {"epochs": 3, "ema": 0.9}, GRAY),
}


def plan_of(case: Case, seed: int = 0) -> Plan:
    """Compiled, and checked in all phases, so that forked processes begin with torch's caches filled."""
    torch.manual_seed(seed)
    plan = graphopt.compile(case.make(), list(case.passes), input=case.shape, verify="off", costs=False)
    plan.check_phases(case.settings.get("epochs", 1))
    return replace(plan, measure=None)  # forecasts of its phases would take a fifth of a run's time


def run(plan: Plan, case: Case, folder: Path, strategy: str, steps: int = STEPS, *, resume: bool = False) -> None:
    """Trains so many steps, in every rank that calls it."""
    usual = {"epochs": 1, "batch": BATCH, "eval_every": 2, "log_every": 1, "ledger": True, "device": "cpu"}
    table = {**usual, "optimizer": {"name": "sgd", "lr": 0.05}, **case.settings, "strategy": strategy}
    limits = {"train_limit": steps // table["epochs"] * BATCH, "eval_limit": 13}
    data = DataSpec.model_validate({"name": "digits", **limits, "augment": case.augment})
    train(plan, folder, settings=TrainSpec.model_validate(table), data=data, resume=resume)


def run_all(plans: Mapping[str, Plan], cases: Mapping[str, Case], folder: Path, strategy: str, steps: int) -> None:
    """Trains every case into a folder of its name."""
    for name, plan in plans.items():
        try:
            run(plan, cases[name], folder / name, strategy, steps)
        except Exception as error:
            raise RuntimeError(name) from error


def in_ranks(count: int, function: Callable[..., None], *arguments: Any, fork: bool = True, group: bool = True) -> list[int | None]:
    """Calls `function(*arguments)` in so many ranks, forked from this process or new ones; their exit statuses.

    Without `group` each run joins them by itself, as it does under torchrun.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = get_context("fork" if fork else "spawn")
    started = [context.Process(target=_rank, args=(rank, count, port, group, function, arguments)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def _rank(rank: int, count: int, port: int, group: bool, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    # Autograd's threads would do this at once, each by itself, and abort where they meet.
    torch.set_num_threads(1)
    # Forked ranks share the lock of the progress bars that torch.fx makes; one that is killed would never give it back.
    tqdm.set_lock(RLock())
    # Which modules a rank has changes no bit, and to measure what they take would take longer than the run.
    rates.measure_rates = lambda device, **_: replace(RATES, device=device)
    if count > 1 and group:
        distributed.init_process_group("gloo", rank=rank, world_size=count)  # for several runs, one after the other
    function(*arguments)
    if count > 1 and group:
        distributed.destroy_process_group()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors, numbers and texts of nested states, by path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}/{number}")
    else:
        yield path, value


def content(folder: Path) -> dict[str, Any]:
    """All that a run has left but for what depends on the clock and on the number of ranks."""
    saved = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    parts = {part: saved[part] for part in ("phase", "history", "decisions", "meter", "buffers", "progress")}
    parts["progress"] = {name: value for name, value in parts["progress"].items() if name not in small_run.TIMES | {"seconds"}}
    for kind, figures in (("step", ("loss", "accuracy", "lr")), ("epoch", ("loss", "accuracy", "train_loss", "train_accuracy"))):
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        parts[kind] = [[of.get(figure) for figure in figures] for of in records if of["kind"] == kind]
    parts["ledger"] = (folder / "ledger.bin").read_bytes()
    return dict(leaves(parts))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The paths at which two runs are not equal to the last bit."""
    return [path for path in sorted(one.keys() | other.keys()) if not _equal(one.get(path, ...), other.get(path, ...))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    return type(one) is type(other) and bool(one == other)


class Found(NamedTuple):
    """Of one case: its modules, steps, tensors and other values that were compared, and per number of ranks the paths that differ."""

    modules: int
    steps: int
    tensors: int
    values: int
    differing: dict[int, list[str]]


def compare(cases: Mapping[str, Case], folder: Path, ranks: Sequence[int] = RANKS, steps: int = STEPS) -> Iterator[tuple[str, Found]]:
    """Trains every case by one process, and on every number of ranks, so many steps; yields what was compared."""
    plans = {name: plan_of(case) for name, case in cases.items()}
    open_data(DataSpec(name="digits"), (1, 8, 8), 0)  # read once, for all ranks
    for count, strategy in {0: "auto", **dict.fromkeys(ranks, "modules")}.items():
        statuses = in_ranks(max(1, count), run_all, plans, cases, folder / str(count), strategy, steps)
        if any(statuses):
            raise RuntimeError(f"{count} ranks ended with {statuses}")
    for name, plan in plans.items():
        whole = content(folder / "0" / name)
        tensors = sum(isinstance(value, torch.Tensor) for value in whole.values())
        steps = len({path.split("/")[2] for path in whole if path.startswith("/step/")})
        found = {count: differing(content(folder / str(count) / name), whole) for count in ranks}
        yield name, Found(isolated_modules(plan.module), steps, tensors, len(whole) - tensors, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| network | modules | steps | tensors | other values |" + "".join(f" differ, K = {count} |" for count in RANKS)]
    lines.append("|---" * (5 + len(RANKS)) + "|")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for name, found in compare({name: CASES[name] for name in options.cases}, Path(folder)):
            row = (found.modules, found.steps, found.tensors, found.values, *(len(paths) for paths in found.differing.values()))
            lines.append(f"| {name} | " + " | ".join(map(str, row)) + " |")
            wrong += [f"{name}, K = {count}: {path}" for count, paths in found.differing.items() for path in paths]
    print("\n".join([*lines, *wrong]))
    text = "\n".join([heading("A chain of ranks against one process", (__doc__ or "").partition("\n")[0]), *lines])
    if options.out:
        options.out.write_text(text + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
