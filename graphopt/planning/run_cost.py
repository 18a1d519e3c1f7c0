"""The cost of a whole run: the forecast of one step, summed over the phases, with evaluation and the filling of feature caches.

Phases follow from decisions: those that can be foreseen from a spec, or those of a finished run. FLOPs and bytes are exact for what they
count; seconds need the machine's rates (`graphopt.cost.measure_rates`), or are the least that a named GPU takes (`graphopt.cost.roofline`).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn

from graphopt.compiler.emit import emit
from graphopt.compiler.pass_base import FeatureCut
from graphopt.compiler.plan import Phase, Plan
from graphopt.compiler.triggers import Decision, step_at
from graphopt.cost import Cost, Rates, StepOptions, forecast
from graphopt.cost.composed import Forecasts
from graphopt.cost.roofline import PeakRates
from graphopt.data.datasets import open_split
from graphopt.errors import RunError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input, image_of, input_of
from graphopt.ir.shapes import SHAPE_BATCH, tensors_in
from graphopt.runtime.quantized import stored_bytes
from graphopt.spec import DataSpec, TrainSpec

#: numbers of training and evaluation images of known data sets, so that a forecast does not need the files
KNOWN = {
    "digits": (1442, 355),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "stl10": (5_000, 8_000),
    "svhn": (73_257, 26_032),
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "kmnist": (60_000, 10_000),
    "imagenette": (9_469, 3_925),
    "imagenet": (1_281_167, 50_000),
}

#: so many phases are forecast sooner one by one than put together from parts, each of which is run by itself first
FEW = 2


@dataclass(frozen=True)
class RunTotals:
    """The sums of a run.

    Attributes:
        forward_flops: of training, of evaluating the full network, and of filling caches (prefixes over the training set, per view).
        feature_bytes, peak_bytes: of the largest feature cache, and of the step with the highest peak.
        seconds: of steps, evaluation and filling, without loading data; None without rates.
    """

    forward_flops: int
    backward_flops: int
    training_forward_flops: int
    evaluation_forward_flops: int
    filling_forward_flops: int
    feature_bytes: int
    peak_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class PhaseCost:
    """One phase of a run: its start and its length in epochs, and the decisions that started it.

    Attributes:
        forward_flops, backward_flops, seconds: of training, per epoch; no seconds without rates.
        filling_flops, filling_seconds: of filling its feature cache, once.
    """

    epoch: float
    epochs: float
    decisions: tuple[Decision, ...]
    forward_flops: int
    backward_flops: int
    seconds: float | None
    step: Cost = field(repr=False)
    filling_flops: int = 0
    filling_seconds: float | None = None
    feature_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        return {**plain, "peak_bytes": self.step.peak_bytes, "decisions": [d.model_dump(mode="json") for d in self.decisions]}


@dataclass(frozen=True)
class RunCost:
    """A run without its passes, and with them.

    Attributes:
        samples, evaluated: images per epoch, and per evaluation.
        complete: whether all decisions are known; False if a trigger waits for measurements: it has not fired here.
    """

    samples: int
    evaluated: int
    epochs: int
    before: RunTotals
    run: RunTotals
    phases: tuple[PhaseCost, ...]
    complete: bool

    @property
    def forward_saved(self) -> float:
        """Share of all forward FLOPs of the run that its passes save."""
        return 1 - self.run.forward_flops / self.before.forward_flops

    @property
    def training_forward_saved(self) -> float:
        """The same without evaluation, which costs the same with and without passes."""
        spent = self.run.training_forward_flops + self.run.filling_forward_flops
        return 1 - spent / self.before.training_forward_flops

    @property
    def final_forward_saved(self) -> float:
        """Share of a training step's forward FLOPs that is saved in the last phase."""
        return 1 - self.phases[-1].forward_flops * self.epochs / self.before.training_forward_flops

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {f"run_{name}": getattr(self, name) for name in ("samples", "evaluated", "epochs", "complete")}
        return {"run_before": asdict(self.before), "run": asdict(self.run), "run_phases": [p.to_dict() for p in self.phases], **plain}


def counts(data: DataSpec) -> tuple[int, int]:
    """Images per epoch, and per evaluation, of the data that a spec names; of the published data set where its files are not there.

    Folders of the published numbers of images are not searched.

    Raises:
        RunError: a folder of images does not exist.
    """
    name, splits = data.name.casefold().removeprefix("torch/").replace("-", "_"), (data.train_split, data.eval_split)
    known = KNOWN.get(name) if splits == ("train", "validation") else None
    if known is not None and (data.root is None or name in ("digits", "imagenette", "imagenet")):
        train, evaluation = known
    else:
        try:
            train, evaluation = (len(open_split(data.name, data.root, split).targets) for split in splits)
        except RunError:
            if known is None:
                raise
            train, evaluation = known
    return min(train, data.train_limit or train), min(evaluation, data.eval_limit or evaluation)


def forecast_run(
    plan: Plan,
    train: TrainSpec,
    *,
    samples: int,
    evaluated: int,
    decisions: Sequence[Decision] | None = None,
    phases: Iterable[Phase] | None = None,
    rates: Rates | PeakRates | None = None,
    known: dict[Hashable, Any] | None = None,
) -> RunCost:
    """The cost of a run that starts with `plan`, in its first phase.

    Args:
        samples, evaluated: images per epoch and per evaluation (see `counts`).
        decisions: of a finished run; default: those that can be foreseen. phases: where they are compiled already.
        rates: the machine's, or the peak rates of a GPU, for seconds.
        known: steps that were forecast before, for runs of the same backbone, data, settings (but for epochs) and rates; those of this run
            are added.

    Raises:
        RunError: the training set has less than one batch.
        CostError: a step cannot be forecast.
    """
    micro = train.micro_batch()
    options = {**train.forecast_options(), "device": rates.gpu if isinstance(rates, PeakRates) else None}
    steps = samples // train.batch
    if not steps:
        raise RunError(f"one training step takes {train.batch} images, the training set has {samples}", where="train.batch")
    redrawn = plan.spec is not None and plan.spec.data.augment.redraws  # else no features are computed anew
    compiled = tuple(plan.phases(train.epochs, decisions) if phases is None else phases)
    compose = known is not None or len(compiled) > FEW
    known = {} if known is None else known
    forecasts: Forecasts = known.setdefault("steps", Forecasts(train.batch, compose=compose, **options))
    if "whole" not in known:
        backbone = emit(plan.sizes.whole)
        known["whole"] = forecasts.of(backbone, plan.sizes.full)
        known[plan.sizes.full] = _forward_cost(backbone, plan.sizes.full, micro, options)
    whole: Cost = known["whole"]
    before = PhaseCost(0, train.epochs, (), steps * whole.forward_flops, steps * whole.backward_flops, _seconds(rates, whole, steps), whole)
    found: list[PhaseCost] = []
    earlier: Plan | None = None
    for start, end, due, current in compiled:
        step, filling, cached = whole, None, 0
        if any(current.effects):
            if (key := (_applied(current), _applied(earlier))) not in known:
                known[key] = _phase_cost(current, earlier, train, samples, forecasts)
            step, filling, cached = known[key]
        forward, backward = _expected_flops(current, step)
        # Blocks that are skipped at random save time in proportion to their FLOPs.
        seconds = _seconds(rates, step, steps * (forward + backward) / step.flops if step.flops else steps)
        length = Fraction(step_at(end, steps) - step_at(start, steps), steps)
        epochs = int(length) if length.denominator == 1 else float(length)
        phase = PhaseCost(start, epochs, due, steps * forward, steps * backward, seconds, step, feature_bytes=cached)
        if filling is not None:
            cost, batches = filling
            if redrawn and (every := current.needs.features and current.needs.features.options.get("refresh")):
                batches += samples / cost.batch * max(0, math.ceil(end) - math.ceil(start) - 1) / every
            phase = replace(phase, filling_flops=int(batches * cost.forward_flops), filling_seconds=_seconds(rates, cost, batches))
        found.append(phase)
        earlier = current if cached else None
    times = [_evaluations(train, phase.start, phase.end) for phase in compiled]
    at_own_size = _evaluating(known[plan.sizes.full], sum(times) * evaluated / micro, rates)
    evaluating = _evaluating_phases(compiled, times, evaluated / micro, known, micro, options, rates)
    complete = decisions is not None or all(value.when.foreseeable for value in plan.passes)
    totals = _totals([before], *at_own_size), _totals(found, *evaluating)
    return RunCost(samples, evaluated, train.epochs, *totals, tuple(found), complete)


def _applied(plan: Plan | None) -> Hashable:
    """What a phase's step follows from: the size of its images, and its passes with the regions that each is applied to now."""
    if plan is None:
        return None
    active = [item for item in plan.progress() if item.active]
    values = [{k: v for k, v in item.instance.value.table().items() if k != "when"} for item in active]
    return plan.base.input, repr([(value, item.active) for value, item in zip(values, active, strict=True)])


def _evaluations(train: TrainSpec, start: float, end: float) -> int:
    """How many evaluations there are from `start` to `end`, in epochs: after every so many epochs, and at the end of the run."""
    last = end == train.epochs and train.epochs % train.eval_every > 0
    return math.floor(end) // train.eval_every - math.floor(start) // train.eval_every + last


def _evaluating(cost: Cost, batches: float, rates: Rates | PeakRates | None) -> tuple[int, float | None]:
    """FLOPs and seconds of so many batches of an evaluation. The last one of an epoch counts as the part that it is."""
    return int(batches * cost.forward_flops), _seconds(rates, cost, batches)


def _evaluating_phases(
    phases: Sequence[Phase],
    times: Sequence[int],
    batches: float,
    known: dict[Hashable, Any],
    batch: int,
    options: Mapping[str, Any],
    rates: Rates | PeakRates | None,
) -> tuple[int, float | None]:
    """The same over a run that is evaluated so many `times` in each phase, at the size of that phase.

    `known` has costs of a batch by the sizes that have been forecast; others are added.
    """
    count: Counter[Input] = Counter()
    graphs = {phase.plan.base.input: phase.plan.base for phase in phases}
    for phase, number in zip(phases, times, strict=True):
        count[phase.plan.base.input] += number
    found = []
    for size, number in (+count).items():
        if size not in known:
            known[size] = _forward_cost(emit(graphs[size]), size, batch, options)
        found.append(_evaluating(known[size], number * batches, rates))
    seconds = [each for _, each in found if each is not None]
    return sum(flops for flops, _ in found), sum(seconds) if rates else None


def _times(flops: int, epochs: float) -> int:
    """FLOPs per epoch times a number of epochs, exact to a step."""
    return round(flops * Fraction(epochs).limit_denominator(2**20))


def _seconds(rates: Rates | PeakRates | None, cost: Cost, times: float) -> float | None:
    return times * rates.seconds(cost) if rates else None


def _totals(phases: Sequence[PhaseCost], evaluation: int, evaluation_seconds: float | None) -> RunTotals:
    training, filling = sum(_times(p.forward_flops, p.epochs) for p in phases), sum(p.filling_flops for p in phases)
    seconds = evaluation_seconds
    if seconds is not None:
        seconds += sum(p.epochs * (p.seconds or 0.0) + (p.filling_seconds or 0.0) for p in phases)
    return RunTotals(
        forward_flops=training + evaluation + filling,
        backward_flops=sum(_times(p.backward_flops, p.epochs) for p in phases),
        training_forward_flops=training,
        evaluation_forward_flops=evaluation,
        filling_forward_flops=filling,
        feature_bytes=max(p.feature_bytes for p in phases),
        peak_bytes=max(p.step.peak_bytes for p in phases),
        seconds=seconds,
    )


def _phase_cost(
    plan: Plan, earlier: Plan | None, train: TrainSpec, samples: int, forecasts: Forecasts
) -> tuple[Cost, tuple[Cost, float] | None, int]:
    """One training step; one batch of filling the feature cache (from that of the phase before), and the number of batches; its size."""
    targets, cut = plan.needs.targets, plan.needs.features
    if cut is None or not (cached := cache_bytes(cut, samples)):
        return forecasts.of(plan.module, plan.graph.input, targets=targets), None, 0
    step = forecasts.of(plan.suffix, input_of(plan.suffix), targets=targets)
    old = earlier.needs.features if earlier is not None else None
    if (earlier is not None and earlier.base is not plan.base) or cut.crops:
        old = None  # features of images of another size
    start = next((n for n in plan.graph.nodes if old is not None and n.name == old.node.name), None)
    if start is cut.node:
        return step, None, cached
    prefix = emit(plan.graph, start=start, stop=cut.node)
    given = input_of(prefix)
    if cut.crops and (image := image_of(given)):
        given = (image[0], image[1] + cut.crops.pixels[0], image[2] + cut.crops.pixels[1])
    fill = _forward_cost(prefix, given, train.micro_batch(), forecasts.options)
    return step, (fill, samples * (cut.options.get("views") or 1) / fill.batch), cached


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of one sample."""
    return tuple(node.meta["val"].shape[1:])


def cache_bytes(cut: FeatureCut, samples: int) -> int:
    """Size of a feature cache; 0 if that is over its limit, so that the prefix runs in every step instead."""
    size = stored_bytes(cut.shape, cut.options.get("dtype") or "float32") * samples * (cut.options.get("views") or 1)
    limit = cut.options.get("limit")
    return size if limit is None or size <= limit else 0


def _expected_flops(plan: Plan, step: Cost) -> tuple[int, int]:
    """A step's forward and backward FLOPs, less what blocks that are skipped at random save on average."""
    forward, backward = float(step.forward_flops), float(step.backward_flops)
    statuses = (item for effects in plan.effects if effects is not None for item in effects.statuses.items())
    skipped = {name: status.skip_probability for name, status in statuses if status.skip_probability}
    if skipped:
        for row in step.by(block for block in find_blocks(plan.base) if block.name in skipped):
            forward -= skipped.get(row.path, 0.0) * row.forward_flops
            backward -= skipped.get(row.path, 0.0) * row.backward_flops
    return round(forward), round(backward)


def _forward_cost(module: nn.Module, input: Input, batch: int, options: Mapping[str, Any]) -> Cost:
    step: StepOptions = {"optimizer": None, "amp": options["amp"], "device": options["device"], "loss": lambda output, _labels: output}
    return forecast(_NoBackward(module), input, batch, **step)


class _NoBackward(nn.Module):
    """A forward pass alone, in a form that can be forecast: no backward runs through it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.unit = body, nn.Parameter(torch.ones(()))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.body(*inputs)
        return tensors_in(y)[0].sum() * self.unit


@dataclass(frozen=True)
class DropPoint:
    """A block after which a prefix may end, and the features of one sample there, in float32."""

    name: str
    shape: tuple[int, ...]
    bytes_per_sample: int


def drop_points(graph: Graph) -> tuple[DropPoint, ...]:
    """The blocks that end at a cut point, in execution order."""
    cuts = {n for n in cut_points(graph) if n.meta["val"].shape[:1] == (SHAPE_BATCH,)}
    ends = ((block.name, block.exits[-1]) for block in find_blocks(graph) if block.exits)
    return tuple(DropPoint(name, _shape(end), 4 * math.prod(_shape(end))) for name, end in ends if end in cuts)
