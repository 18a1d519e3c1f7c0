"""A chain of two processes against one process, and against data parallelism with two, at the same global batch, in one run.

    python tools/modules_bench.py [--models resnet110 vit] [--rounds 12] [--steps 8] [--out tools/tables/modules.md]

Two processes of one thread each, one per core, take turns with every variant in random order: the backbone end to end, in one process and
with DDP; and its `supervise` plan of two modules, for each balance, in one process and as a chain (`strategy = "modules"`). They train by
the runner's own phases and strategies on random images. A variant's step is the wall time between two steps of its slowest process once
the chain is filled; `--steps` of them a round. Ratios are of the same round. Quartiles over rounds. Processor time is that of the process
that has most of it in a step: where others share the cores, it says more than wall time.

The second table has each rank of a chain next to its forecast: processor time of its process in a step (receiving and sending included)
against seconds by rates measured here; live bytes of a real step against the forecast's peak; bytes sent in a step, heads of messages
included, against those of the tensors.
"""

import argparse
import os
import pickle
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from machine import heading
from torch import nn
from torch.multiprocessing import get_context

import graphopt
from graphopt.compiler.plan import Plan
from graphopt.compiler.stages import every_module, stages
from graphopt.cost import Rates, measure, measure_rates
from graphopt.cost.rates import TimedStep
from graphopt.data.loader import Batch
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.supervise import Supervise
from graphopt.planning.modules import ChainRank, forecast_chain
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train.modules import Modular
from graphopt.train.phase import Phase, RunContext
from graphopt.train.preflight import Inputs
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Replicated, Strategy

RANKS = 2
BALANCES = ("time", "blocks", "memory")


class Model(NamedTuple):
    """How to build a backbone, one sample's shape, the global batch, and the optimizer."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    batch: int
    optimizer: dict[str, Any]


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)


SGD, ADAMW = {"name": "sgd", "lr": 1e-3}, {"name": "adamw", "lr": 1e-4}
MODELS = {
    "resnet110": Model(lambda: cifar.build("resnet110"), (3, 32, 32), 32, SGD),
    "resnet32": Model(lambda: cifar.build("resnet32"), (3, 32, 32), 32, SGD),
    "vit": Model(lambda: vit(img_size=64, patch_size=8), (3, 64, 64), 32, ADAMW),
    "tiny": Model(lambda: vit(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2), (3, 32, 32), 8, ADAMW),
}


@dataclass(frozen=True)
class Variant:
    """What is timed: a balance of `supervise`, or the backbone end to end (None), by one process, ddp or a chain."""

    balance: str | None
    strategy: str

    def __str__(self) -> str:
        how = {"single": "one process", "ddp": "DDP, 2 processes", "modules": "chain of 2"}[self.strategy]
        return f"{self.balance or 'end to end'}, {how}"


VARIANTS = [Variant(None, "single"), Variant(None, "ddp"), Variant("time", "ddp")]
VARIANTS += [Variant(balance, strategy) for balance in BALANCES for strategy in ("single", "modules")]


def training(model: Model, strategy: str) -> TrainSpec:
    table = {"epochs": 1, "batch": model.batch, "optimizer": model.optimizer, "device": "cpu", "strategy": strategy}
    return TrainSpec.model_validate({**table, "scheduler": "constant", "deterministic": True})


def plan_of(model: Model, cuts: tuple[str, ...] | None) -> Plan:
    torch.manual_seed(0)
    passes = [] if cuts is None else [Supervise(cuts=cuts)]
    return graphopt.compile(model.make(), passes, input=model.input, verify="off", costs=False)


def cuts_of(model: Model, rates: Rates) -> dict[str | None, tuple[str, ...] | None]:
    """Where each balance cuts."""
    graph = graphopt.trace(model.make(), model.input, compare=False)
    step = TimedStep(model.batch, lambda: rates, **training(model, "single").forecast_options())
    found: dict[str | None, tuple[str, ...] | None] = {None: None}
    for balance in BALANCES:
        value = Supervise(modules=RANKS, balance=balance).settle(graph, step)
        found[balance] = tuple(cut.label for cut in value.choose_cuts(graph))
    return found


class Trainer:
    """One variant in this process: a phase of the runner, on random images."""

    def __init__(self, model: Model, variant: Variant, plan: Plan, ranks: Ranks, folder: Path) -> None:
        settings = training(model, variant.strategy)
        kinds: dict[str, type[Strategy]] = {"single": Strategy, "ddp": Replicated, "modules": Modular}
        strategy = kinds[variant.strategy].of(settings)
        self.strategy = strategy if variant.strategy == "single" else strategy.with_ranks(ranks)
        self.strategy.signal = lambda: 0
        data = DataSpec(train_limit=8 * model.batch)
        inputs = Inputs.open(settings, data, model.input, self.strategy)
        features = inputs.features(folder, plan.digest, {})
        context = RunContext(settings, self.strategy, inputs.feeds, 10, None, features)
        self.phase = Phase(plan, context)
        self.phase.begin()
        self.phase.train_mode()
        size = model.batch // self.strategy.peers.count
        self.batch = Batch(torch.arange(size), torch.randn(size, *model.input), torch.arange(size) % 10)
        self.done = 0

    def run(self, steps: int) -> "Window":
        stream: Iterator[Batch] = self.strategy.batches(iter([self.batch] * steps), steps, training=True)
        moments, busy = [time.perf_counter()], time.process_time()
        for _ in range(steps):
            self.phase.step(stream, self.done)
            self.done += 1
            moments.append(time.perf_counter())
        next(stream, None)  # waits until the last message is taken
        sent = self.strategy.times()[self.strategy.ranks.number]["bytes"] if isinstance(self.strategy, Modular) else 0
        return Window((moments[-1] - moments[1]) / (steps - 1), (time.process_time() - busy) / steps, sent / steps)


class Window(NamedTuple):
    """Per step of one process: wall seconds, its processor time, and bytes sent."""

    seconds: float
    busy: float
    sent: float


def work(rank: int, port: int, name: str, cuts: dict[str | None, tuple[str, ...] | None], rounds: int, steps: int, out: str) -> None:
    """One of the two processes; rank 0 writes what both have measured."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) >= RANKS:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    ranks, model = Ranks.join(600).connected(torch.device("cpu")), MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        own = [v for v in VARIANTS if rank == 0 or v.strategy != "single"]
        trainers = {v: Trainer(model, v, plan_of(model, cuts[v.balance]), ranks, Path(folder) / str(v)) for v in own}
        found: dict[str, Any] = {"windows": [], "live": {}}
        order = random.Random(0)
        for number in range(rounds + 1):  # the first warms up
            for variant in order.sample(VARIANTS, len(VARIANTS)):
                ranks.gather(None)
                window = trainers[variant].run(steps) if variant in trainers else None
                windows = ranks.gather(window)
                if number:
                    found["windows"].append((variant, windows))
        found["live"] = ranks.gather({balance: live(model, cuts[balance], RANKS - 1 - rank) for balance in BALANCES})
        if ranks.first:
            Path(out).write_bytes(pickle.dumps(found))
    ranks.leave()


def live(model: Model, cuts: tuple[str, ...] | None, place: int) -> int:
    """The most bytes that a real step of a stage holds, measured on a copy in this process."""
    plan, train = plan_of(model, cuts), training(model, "modules")
    stage = stages(plan, every_module(plan), model.batch)[place]
    return measure(stage.module, (), model.batch, **{**train.forecast_options(), **stage.options}).peak_bytes


def measured(name: str, cuts: dict[str | None, tuple[str, ...] | None], rounds: int, steps: int) -> dict[str, Any]:
    with socket.socket() as free, tempfile.NamedTemporaryFile() as file:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = get_context("spawn")
        arguments = (port, name, cuts, rounds, steps, file.name)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"{name}: a process has failed")
        return dict(pickle.loads(Path(file.name).read_bytes()))


def quartiles(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def slowest(windows: list[Window | None], figure: str) -> float:
    return max(getattr(w, figure) for w in windows if w is not None)


def speeds(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Rows of the first table."""
    rounds = {v: [windows for variant, windows in found["windows"] if variant == v] for v in VARIANTS}
    seconds = {v: [slowest(windows, "seconds") for windows in rounds[v]] for v in VARIANTS}
    for variant in VARIANTS:
        alone, ddp = seconds[Variant(variant.balance, "single")], seconds[Variant(None, "ddp")]
        against = [quartiles([b / a for a, b in zip(seconds[variant], other, strict=True)], ".2f") for other in (alone, ddp)]
        images = MODELS[name].batch / statistics.median(seconds[variant])
        step = quartiles([1000 * s for s in seconds[variant]], ".0f")
        busy = quartiles([1000 * slowest(windows, "busy") for windows in rounds[variant]], ".0f")
        yield f"| {name} | {variant} | {step} | {images:.0f} | {against[0]} | {against[1]} | {busy} |\n"


def ranks_of(name: str, balance: str, cuts: tuple[str, ...], rates: Rates, found: dict[str, Any]) -> Iterator[str]:
    """Rows of the second table: the ranks of one chain, in its order."""
    model = MODELS[name]
    (phase,) = forecast_chain(plan_of(model, cuts), training(model, "modules"), ranks=RANKS, rates=rates).phases
    windows = [w for variant, w in found["windows"] if variant == Variant(balance, "modules")]
    cost: ChainRank
    for cost in phase.ranks:
        mine = [w[cost.rank] for w in windows]
        busy, sent = quartiles([1000 * w.busy for w in mine], ".0f"), statistics.median(w.sent for w in mine)
        held = f"{cost.held_bytes:,} | {found['live'][cost.rank][balance]:,}"
        yield f"| {name} | {balance}, {', '.join(cuts)} | {cost.rank} | {1000 * cost.seconds:.0f} | {busy} | {held} |"
        yield f" {cost.sent_bytes:,} | {sent:,.0f} |\n"


FIRST = """
| network | variant | step, ms | images/s | times one process, same plan | times end-to-end DDP | processor time, ms |
|---|---|---|---|---|---|---|
"""
SECOND = """
| network | balance, cut | rank | forecast, ms | processor time, ms | bytes held, forecast | measured | bytes sent, forecast | measured |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet110", "vit"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = measure_rates()
    first, second = list[str](), list[str]()
    for name in options.models:
        cuts = cuts_of(MODELS[name], rates)
        found = measured(name, cuts, options.rounds, options.steps)
        first += speeds(name, found)
        second += [row for balance in BALANCES for row in ranks_of(name, balance, cuts[balance] or (), rates, found)]
        text = heading("A chain of two processes", __doc__) + FIRST + "".join(first) + SECOND + "".join(second)
        by = f"{rates.flop:.3g} s/FLOP of convolutions, {rates.product:.3g} of matrix products, "
        by += f"{rates.byte:.3g} s/byte, {rates.kernel:.3g} s/kernel"
        text += f"\nRates: {by}; error on the networks that they were fitted to: {rates.error:.0%}.\n"
        if options.out:
            options.out.write_text(text)
        print("".join(first[-len(VARIANTS) :]))


if __name__ == "__main__":
    main()
