"""What each rank of a run needs and sends, forecast in one process: memory and messages of a step, phase by phase."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.compiler.units import units_of
from graphopt.cost import Cost, forecast
from graphopt.cost.ranks import Collective, Parallel
from graphopt.errors import RunError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.inputs import Input
from graphopt.planning.run_cost import cache_bytes
from graphopt.runtime.quantized import stored_bytes
from graphopt.spec import TrainSpec

StrategyName = Literal["auto", "single", "ddp", "fsdp"]


@dataclass(frozen=True)
class Kept:
    """Bytes that lie in memory all the time, and that no step touches.

    Attributes:
        averages: averaged weights (`train.ema`), of which a rank of fsdp has its parts.
        prefix: weights in front of cached features; evaluations use them.
    """

    averages: int = 0
    prefix: int = 0

    @property
    def bytes(self) -> int:
        return self.averages + self.prefix


@dataclass(frozen=True)
class RankPhase:
    """One phase: its start and its length in epochs, and a step of rank 0, which holds the largest parts. `alone` is one process's step.

    Attributes:
        kept, kept_alone: what is in memory besides the step's.
        feature_bytes: cached features that rank 0 owns, in RAM or on disk; 0 where their number is not known.
        exchanged: the features that ranks give each other in a step; a rank has its batch's of itself only by chance, so `sent` is a mean.
    """

    epoch: float
    epochs: float
    step: Cost = field(repr=False)
    alone: Cost = field(repr=False)
    kept: Kept = Kept()
    kept_alone: Kept = Kept()
    feature_bytes: int = 0
    exchanged: Collective | None = None

    @property
    def messages(self) -> tuple[Collective, ...]:
        """All that ranks exchange in a step."""
        return (*self.step.collectives, *([self.exchanged] if self.exchanged is not None else []))

    @property
    def peak_bytes(self) -> int:
        """The most that is live on rank 0."""
        return self.step.peak_bytes + self.kept.bytes

    @property
    def peak_bytes_alone(self) -> int:
        """The most that is live in one process that trains alone."""
        return self.alone.peak_bytes + self.kept_alone.bytes

    @property
    def peak_parts(self) -> dict[str, int]:
        """What adds up to `peak_bytes`, by kind."""
        return {**self.step.peak_parts, "averages": self.kept.averages, "prefix": self.kept.prefix}

    def sent(self, ranks: int, backend: str) -> int:
        """Bytes that a rank sends in a step, and receives as many."""
        return sum(message.sent(ranks, backend) for message in self.messages)


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
            {"name": m.name, "calls": m.calls, "bytes": m.bytes, "sizes": list(m.sizes), "sent_bytes": m.sent(self.ranks, self.backend)}
            for m in phase.messages
        ]
        peaks = {name: getattr(phase.step, name) for name in (*sizes, "peak_phase")}
        seconds = {"link_seconds": sent / link} if link else {}
        of = {name: getattr(phase, name) for name in ("epoch", "epochs", "peak_bytes", "peak_bytes_alone", "peak_parts", "feature_bytes")}
        return {**of, **peaks, "collectives": messages, "sent_bytes": sent, "received_bytes": sent, **seconds}


def forecast_ranks(
    plan: Plan,
    train: TrainSpec,
    *,
    ranks: int,
    strategy: StrategyName | None = None,
    decisions: Sequence[Decision] | None = None,
    samples: int | None = None,
) -> RanksCost:
    """The cost of each rank of a run that starts with `plan`, in its first phase. Starts no process.

    Args:
        strategy: default: the spec's. decisions: of a finished run; default: those that can be foreseen.
        samples: images of the training set, by which cached features may be over their limit; default: they are not.

    Raises:
        RunError: the batch does not divide among the ranks, or the strategy does not go with their number.
        CostError: a step cannot be forecast.
    """
    name = _strategy(strategy or train.strategy, ranks)
    micro, backend = train.micro_batch(ranks), _backend(train.device)
    phases = []
    for start, end, _, current in plan.phases(train.epochs, decisions):
        options = {**train.forecast_options(), "targets": current.needs.targets}
        trained = trained_part(current, samples)
        alone = forecast(trained.module, trained.input, train.batch, **options)
        kept = Kept(_averages(current, train, "single", 1), trained.left_out)
        phase = RankPhase(start, end - start, alone, alone, kept, kept, trained.feature_bytes(samples, 1))
        if name != "single":
            options["parallel"] = _parallel(name, current, trained, train, ranks, backend)
            step = forecast(trained.module, trained.input, train.batch // ranks, **options)
            kept = replace(kept, averages=_averages(current, train, name, ranks))
            exchanged = trained.exchanged(micro, train.accumulate)
            phase = replace(phase, step=step, kept=kept, feature_bytes=trained.feature_bytes(samples, ranks), exchanged=exchanged)
        phases.append(phase)
    return RanksCost(ranks, name, backend, micro, train.accumulate, tuple(phases))


@dataclass(frozen=True)
class TrainedPart:
    """What a phase's steps run: the whole module on images, or what follows a cut on cached features.

    Attributes:
        input: the shape of one sample's input.
        row_bytes: of one sample's features in the cache; 0 for images. views: fixed ones of each sample that are cached.
        left_out: bytes of the weights in front of the cut.
    """

    module: nn.Module
    input: Input
    row_bytes: int = 0
    views: int = 1
    left_out: int = 0

    def feature_bytes(self, samples: int | None, ranks: int) -> int:
        """Cached features of rank 0, which owns the most."""
        return math.ceil((samples or 0) / ranks) * self.views * self.row_bytes

    def exchanged(self, batch: int, accumulate: int) -> Collective | None:
        """One message per micro-batch, of a rank's batch: features, and targets of 8 bytes."""
        size = batch * (self.row_bytes + 8)
        return Collective("all-to-all", accumulate, accumulate * size, (size,)) if self.row_bytes else None


def trained_part(plan: Plan, samples: int | None) -> TrainedPart:
    """What the steps of a plan's phase run; a cache over its limit is none."""
    cut = plan.needs.features
    if cut is None or not cache_bytes(cut, samples or 1):
        return TrainedPart(plan.module, plan.graph.input)
    from graphopt.train.feature_cache.prefix import OnFeatures

    suffix, value = OnFeatures(emit(plan.graph, start=cut.node)), cut.node.meta["val"]
    behind = {id(tensor) for tensor in _tensors(suffix)}
    left_out = sum(tensor.nbytes for tensor in _tensors(plan.module) if id(tensor) not in behind)
    row_bytes = stored_bytes(cut.shape, cut.options["dtype"])
    return TrainedPart(suffix, tuple(value.shape[1:]), row_bytes, cut.options.get("views") or 1, left_out)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _averages(plan: Plan, train: TrainSpec, name: str, ranks: int) -> int:
    """Bytes of the averaged weights of rank 0: a copy of the network, which fsdp shards as it does the network."""
    if train.ema is None:
        return 0
    if name != "fsdp":
        return sum(tensor.nbytes for tensor in _tensors(plan.module))
    units = units_of(plan.module, [block.paths for block in find_blocks(plan.graph)])
    names = dict(plan.module.named_parameters(remove_duplicate=False))
    apart = {id(names[path]) for path in (*units.replicated, *units.unused)}
    whole = sum(t.nbytes for t in _tensors(plan.module) if id(t) in apart or not isinstance(t, nn.Parameter))
    # Parts are rows, as many on each rank.
    rows = ((p, math.ceil(p.shape[0] / ranks)) for p in plan.module.parameters() if id(p) not in apart)
    return whole + sum(count * p[0].numel() * p.element_size() for p, count in rows)


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


def _parallel(name: str, plan: Plan, trained: TrainedPart, train: TrainSpec, ranks: int, backend: str) -> Parallel:
    if name == "fsdp":
        return sharded(plan, train, ranks, backend)
    unused = [f"suffix.{path}" if trained.row_bytes else path for path in plan.report.unused]
    return Parallel.replicated(ranks, unused=unused, backend=backend)


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

    return Parallel(ranks, wrap, strategy.without_reduction, 1, strategy.after_backward, backend)
