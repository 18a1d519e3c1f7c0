"""What each rank of a run needs and sends, forecast in one process: memory and messages of a step, phase by phase."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.cost import Cost, forecast
from graphopt.cost.ranks import Parallel
from graphopt.errors import RunError
from graphopt.spec import TrainSpec

StrategyName = Literal["auto", "single", "ddp", "fsdp"]


@dataclass(frozen=True)
class RankPhase:
    """One phase: its first epoch, their number, and a step of rank 0, which holds the largest parts. `alone` is one process's step."""

    epoch: int
    epochs: int
    step: Cost = field(repr=False)
    alone: Cost = field(repr=False)

    def sent(self, ranks: int, backend: str) -> int:
        """Bytes that a rank sends in a step, and receives as many."""
        return sum(message.sent(ranks, backend) for message in self.step.collectives)


@dataclass(frozen=True)
class RanksCost:
    """A run on several ranks.

    Attributes:
        strategy: single, ddp or fsdp.
        backend: gloo or nccl, whose algorithms `sent` counts.
        micro_batch: samples that one rank takes through the network at once, `accumulate` times a step.
    """

    ranks: int
    strategy: str
    backend: str
    micro_batch: int
    accumulate: int
    phases: tuple[RankPhase, ...]

    def to_dict(self, link: int | None = None) -> dict[str, Any]:
        """Plain values, for JSON; `link` is a rate in bytes per second."""
        names = ("ranks", "strategy", "backend", "micro_batch", "accumulate")
        return {**{name: getattr(self, name) for name in names}, "phases": [self._phase(phase, link) for phase in self.phases]}

    def _phase(self, phase: RankPhase, link: int | None) -> dict[str, Any]:
        sizes = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "buffer_bytes", "input_bytes", "saved_activation_bytes")
        sent = phase.sent(self.ranks, self.backend)
        messages = [
            {"name": m.name, "calls": m.calls, "bytes": m.bytes, "sent_bytes": m.sent(self.ranks, self.backend)}
            for m in phase.step.collectives
        ]
        peaks = {name: getattr(phase.step, name) for name in (*sizes, "peak_bytes", "peak_phase", "peak_parts")}
        seconds = {"link_seconds": sent / link} if link else {}
        of = {"epoch": phase.epoch, "epochs": phase.epochs, "peak_bytes_alone": phase.alone.peak_bytes}
        return {**of, **peaks, "collectives": messages, "sent_bytes": sent, "received_bytes": sent, **seconds}


def forecast_ranks(
    plan: Plan, train: TrainSpec, *, ranks: int, strategy: StrategyName | None = None, decisions: Sequence[Decision] | None = None
) -> RanksCost:
    """The cost of each rank of a run that starts with `plan`, in its first phase. Starts no process.

    Args:
        strategy: default: the spec's. decisions: of a finished run; default: those that can be foreseen.

    Raises:
        RunError: the batch does not divide among the ranks, or the strategy does not go with their number.
        CostError: a step cannot be forecast.
    """
    name = _strategy(strategy or train.strategy, ranks)
    batch, backend = train.micro_batch(ranks), _backend(train.device)
    phases = []
    for start, end, _, current in plan.phases(train.epochs, decisions):
        options = {**train.forecast_options(), "targets": current.needs.targets}
        alone = forecast(current.module, current.graph.input, train.micro_batch(), **options)
        if name != "single":
            options["parallel"] = _parallel(name, current, train, ranks, backend)
        # Until features are exchanged between ranks, a prefix that could be cached runs in every step.
        step = forecast(current.module, current.graph.input, batch, **options) if name != "single" else alone
        phases.append(RankPhase(start, end - start, step, alone))
    return RanksCost(ranks, name, backend, batch, train.accumulate, tuple(phases))


def _strategy(name: str, ranks: int) -> str:
    """The strategy that `ranks` processes train with, as `graphopt.train.strategy.choose` has it."""
    if ranks == 1:
        return "single"
    if name == "single":
        raise RunError(f'strategy = "single" is one process, not {ranks}', where="--strategy", fix="Use auto, ddp or fsdp")
    return "ddp" if name == "auto" else name


def _backend(device: str) -> str:
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "nccl" if cuda else "gloo"


def _parallel(name: str, plan: Plan, train: TrainSpec, ranks: int, backend: str) -> Parallel:
    if name == "fsdp":
        return sharded(plan, train, ranks, backend)
    return Parallel.replicated(ranks, accumulate=train.accumulate, unused=plan.report.unused, backend=backend)


def sharded(plan: Plan, train: TrainSpec, ranks: int, backend: str) -> Parallel:
    """FSDP: the strategy itself shards the copy that takes the step, on the CPU. Raises RunError for settings that it refuses."""
    from torch.distributed.device_mesh import init_device_mesh

    from graphopt.train.fsdp import Sharded
    from graphopt.train.ranks import Ranks

    strategy = Sharded.of(train.model_copy(update={"device": "cpu"})).with_ranks(Ranks(0, ranks))

    def wrap(module: nn.Module) -> nn.Module:
        with unset_fake_temporarily():  # a mesh reads its own tensor
            strategy._mesh = init_device_mesh("cpu", (ranks,))
        return strategy.wrap(module, plan)

    return Parallel(ranks, wrap, strategy.without_reduction, train.accumulate, 1, strategy.after_backward, backend)
