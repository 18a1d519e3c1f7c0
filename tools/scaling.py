"""Two processes of one thread each against one: images per second of `graphopt train` and of plain DDP, in the same run.

    python tools/scaling.py [--launches 2] [--epochs 5] [--steps 5] [--batch 32] [--out tools/tables/scaling.md]

Runs of one and of two processes take turns. In each, every epoch of graphopt's training loop (with its checks, agreement and metrics) is
followed by as many plain steps of the untouched model on the same batches: the loss, backward and the same optimizer, under torch's
DistributedDataParallel where there are two. The global batch is the same. The first epoch of a launch is not counted. Bytes are those of
all messages of a step: as forecast, as counted by torch's dispatcher in a step on two ranks, and as received on the loopback per
rank in graphopt's epochs, headers included; the last is of use on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from epochs import trained_by
from machine import heading
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.cost import measure
from graphopt.cost.ranks import Parallel
from graphopt.data.loader import Batch
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.planning.ranks import forecast_ranks
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train
from graphopt.train.optimizer import build_optimizer
from graphopt.train.ranks import Ranks
from graphopt.train.run import Run
from graphopt.train.strategy import Replicated

SHAPE = (3, 32, 32)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-110": lambda: CifarResNet(110),
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10),
}


def settings(options: argparse.Namespace) -> TrainSpec:
    optimizer = {"name": "sgd", "lr": 0.01}
    table = {"epochs": options.epochs, "batch": options.batch, "device": "cpu", "eval_every": options.epochs, "optimizer": optimizer}
    return TrainSpec.model_validate(table)


def received() -> int:
    """Bytes that this machine's loopback has received."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


class Timed:
    """Epochs of graphopt, each followed by plain steps on the same batches."""

    def __init__(self, model: nn.Module, ranks: int, steps: int, spec: TrainSpec) -> None:
        self.model, self.ranks, self.steps, self.spec = model, ranks, steps, spec
        self.call: nn.Module | None = None  # torch.distributed is not there yet
        self.seconds: dict[str, list[float]] = {"graphopt": [], "plain": []}
        self.bytes: list[float] = []  # per step and rank, on the loopback

    def epoch(self, run: Run, train_on: Callable[[], bool]) -> bool:
        before = self._now(run), received()
        ended = train_on()
        self.seconds["graphopt"].append(self._now(run) - before[0])
        self.bytes.append((received() - before[1]) / self.steps / self.ranks)
        self._plain(run)
        return ended

    @staticmethod
    def _now(run: Run) -> float:
        """The time when all ranks are here."""
        run.strategy.ranks.largest(0)
        return time.perf_counter()

    def _plain(self, run: Run) -> None:
        if self.call is None:
            self.call = DistributedDataParallel(self.model) if self.ranks > 1 else self.model
            self.optimizer = build_optimizer(self.model, self.spec.optimizer)
        self.model.train()
        before = self._now(run)
        for batch in self._batches(run):
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.call(batch.input), batch.target).backward()
            self.optimizer.step()
        self.seconds["plain"].append(self._now(run) - before)

    def _batches(self, run: Run) -> Iterator[Batch]:
        return islice(run.state.phase.feed.batches(run.progress.epoch), self.steps)


def rank(name: str, options: argparse.Namespace) -> None:
    """What each process does; rank 0 writes what it has found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, spec, count = MODELS[name](), settings(options), int(os.environ["WORLD_SIZE"])
    plan = graphopt.compile(deepcopy(model), [], input=SHAPE, verify="off", costs=False)
    timed = Timed(model, count, options.steps, spec)
    data = DataSpec(name="digits", train_limit=options.batch * options.steps, eval_limit=options.batch)
    with trained_by(timed.epoch):
        train(plan, Path(options.folder, "run"), settings=spec, data=data)
    found: dict[str, Any] = {"seconds": timed.seconds, "loopback": timed.bytes}
    if os.environ["RANK"] == "0":
        Path(options.folder, "found.json").write_text(json.dumps(found))
    os._exit(0)  # the plain module outlives its process group, which torch does not take at an exit


def messages(name: str, options: argparse.Namespace) -> None:
    """The bytes of all messages of a step, counted on real ranks."""
    torch.manual_seed(0)
    spec, ranks = settings(options), Ranks.join(60).connected(torch.device("cpu"))
    plan = graphopt.compile(MODELS[name](), [], input=SHAPE, verify="off", costs=False)
    real = Replicated.of(spec).with_ranks(ranks)
    way = Parallel(ranks.count, lambda module: real.wrap(module, plan, plan.report.unused), real.without_reduction)
    cost = measure(plan.module, plan.graph.input, spec.batch // ranks.count, **spec.forecast_options(), targets=False, parallel=way)
    if ranks.first:
        Path(options.folder, "found.json").write_text(json.dumps(sum(message.bytes for message in cost.collectives)))
    ranks.leave()


def forecast(name: str, options: argparse.Namespace) -> int:
    """The same as forecast, in a process without ranks."""
    plan = graphopt.compile(MODELS[name](), [], input=SHAPE, verify="off", costs=False)
    return sum(message.bytes for message in forecast_ranks(plan, settings(options), ranks=2).phases[0].step.collectives)


def launch(what: str, name: str, ranks: int, options: argparse.Namespace) -> Any:
    """Starts `ranks` processes of this file; returns what rank 0 has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        chosen = [f"--{key}={getattr(options, key)}" for key in ("epochs", "steps", "batch")]
        command = [sys.executable, __file__, f"--do={what}", f"--model={name}", f"--folder={folder}", *chosen]
        started = []
        for number in range(ranks):
            names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in names.items()} | {"OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(command, env=environment))
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise SystemExit(1)
        return json.loads(Path(folder, "found.json").read_text())


def quartiles(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in statistics.quantiles(values, n=4, method="inclusive"))


def rows(name: str, options: argparse.Namespace) -> tuple[list[str], str]:
    """Of one model: the rows of the table, and the line about bytes."""
    rates: dict[tuple[str, int], list[float]] = {}
    loopback: list[float] = []
    for _ in range(options.launches):
        for ranks in (1, 2):
            found = launch("rank", name, ranks, options)
            for what, seconds in found["seconds"].items():
                rates.setdefault((what, ranks), []).extend(options.batch * options.steps / s for s in seconds[1:])
            loopback += found["loopback"][1:] if ranks == 2 else []
    middle = {key: statistics.median(values) for key, values in rates.items()}
    lines, gains = [], {what: middle[what, 2] / middle[what, 1] for what in ("plain", "graphopt")}
    for what, label in (("plain", "plain, untouched model"), ("graphopt", "graphopt train")):
        lines.append(f"| {name} | {label} | {quartiles(rates[what, 1])} | {quartiles(rates[what, 2])} | {gains[what]:.2f} |")
    counted, expected = launch("messages", name, 2, options), forecast(name, options)
    same = "as counted" if expected == counted else f"counted {counted:,}"
    ratio = f"{name}: graphopt's two processes make {middle['graphopt', 2] / middle['plain', 2]:.3f} of plain DDP's images per second"
    received_bytes = f"{statistics.median(loopback):,.0f} received per rank on the loopback"
    return lines, f"- {ratio}; {expected:,} bytes of messages forecast, {same}; {received_bytes}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=2, help="of one process, and of two, for each model")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="images per step, over all processes")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, help="also write the table here")
    for name in ("do", "model", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        {"rank": rank, "messages": messages}[options.do](options.model, options)
        return
    head = "| model at 32 px | what | images/s, one process: quartiles | two processes | two / one |"
    table, about = [head, "|---" * 5 + "|"], []
    for name in options.models:
        lines, text = rows(name, options)
        table += lines
        about.append(text)
    result = "\n".join([heading("Two processes against one", (__doc__ or "").partition("\n")[0]), *table, "", *about, ""])
    print(result)
    if options.out:
        options.out.write_text(result)


if __name__ == "__main__":
    main()
