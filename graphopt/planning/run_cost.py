"""What a whole run costs: the forecast of one step, integrated over phases; evaluation and the filling of feature caches counted in.

Phases come from decisions: a spec's own, where its triggers are known beforehand, or those of a finished run, where they were measured.
FLOPs and bytes are exact for what they count; seconds need the machine's rates (`graphopt.cost.measure_rates`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.cost import Cost, Rates, forecast
from graphopt.errors import RunError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.shapes import SHAPE_BATCH
from graphopt.spec import DataSpec, TrainSpec

#: training and evaluation images of data sets whose files need not be there for a forecast
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


@dataclass(frozen=True)
class Work:
    """A run, or what it would be without its passes. FLOPs are 2 per multiply-accumulate.

    Attributes:
        forward_flops, backward_flops: everything, evaluation and cache filling included.
        training_forward_flops: of training steps alone; their backward is `backward_flops`, there is no other.
        evaluation_forward_flops: the full network over the evaluation split, as often as the run evaluates.
        filling_forward_flops: prefixes over the training set, once per drop and view.
        feature_bytes: the largest cache that the run keeps.
        peak_bytes: the most that a step of any phase holds (see `graphopt.cost.Cost`).
        seconds: steps, evaluation and filling at the rates that were given, else None. Loading data is not in it.
    """

    forward_flops: int
    backward_flops: int
    training_forward_flops: int
    evaluation_forward_flops: int
    filling_forward_flops: int
    feature_bytes: int
    peak_bytes: int
    seconds: float | None = None

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PhaseWork:
    """One phase: its epochs, what began it, its FLOPs per epoch of training, and the bytes it keeps.

    Attributes:
        seconds: per epoch of training, filling aside; None without rates. step: one training step.
    """

    epoch: int
    epochs: int
    decisions: tuple[Decision, ...]
    forward_flops: int
    backward_flops: int
    filling_flops: int
    feature_bytes: int
    peak_bytes: int
    seconds: float | None
    step: Cost = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        return {**plain, "decisions": [d.model_dump(mode="json") for d in self.decisions]}


@dataclass(frozen=True)
class RunWork:
    """A run before and after its passes.

    Attributes:
        samples, evaluated: images per epoch, and per evaluation.
        before: every epoch trained whole. run: as the decisions have it. phases: one by one.
        foreseen: whether the decisions are the run's own; False where a trigger has yet to measure, and has not fired here.
    """

    samples: int
    evaluated: int
    epochs: int
    before: Work
    run: Work
    phases: tuple[PhaseWork, ...] = field(default=())
    foreseen: bool = True

    @property
    def forward_saved(self) -> float:
        """Share of the forward FLOPs that the run does without, averaged over it, everything counted in."""
        return 1 - self.run.forward_flops / self.before.forward_flops

    @property
    def training_forward_saved(self) -> float:
        """The same of training steps and filling, without evaluation, which costs the same in both."""
        kept = self.run.training_forward_flops + self.run.filling_forward_flops
        return 1 - kept / self.before.training_forward_flops

    @property
    def final_forward_saved(self) -> float:
        """The share of a training step's forward FLOPs that the last phase does without."""
        return 1 - self.phases[-1].forward_flops * self.epochs / self.before.training_forward_flops

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `run_before`, `run`, and what they were worked out from."""
        return {
            "run_before": self.before.to_dict(),
            "run": self.run.to_dict(),
            "run_phases": [p.to_dict() for p in self.phases],
            "run_samples": self.samples,
            "run_evaluated": self.evaluated,
            "run_epochs": self.epochs,
            "run_foreseen": self.foreseen,
        }


def counts(data: DataSpec) -> tuple[int, int]:
    """Images per epoch, and per evaluation, of the data a spec names; the files are opened only for a data set of unknown size.

    Raises:
        RunError: a folder of images that is not there.
    """
    name = data.name.casefold().removeprefix("torch/").replace("-", "_")
    default = data.train_split == "train" and data.eval_split == "validation"
    if name in KNOWN and default:
        train, evaluation = KNOWN[name]
    else:
        from graphopt.data.datasets import open_split

        train = len(open_split(data.name, data.root, data.train_split).targets)
        evaluation = len(open_split(data.name, data.root, data.eval_split).targets)
    return min(train, data.train_limit or train), min(evaluation, data.eval_limit or evaluation)


def run_work(
    plan: Plan,
    train: TrainSpec,
    *,
    samples: int,
    evaluated: int,
    decisions: Sequence[Decision] | None = None,
    rates: Rates | None = None,
) -> RunWork:
    """What a run of `plan` (as compiled, before any decision) computes, holds, and takes.

    Args:
        train: the run: epochs, batch, optimizer, how often it evaluates.
        samples, evaluated: images per epoch and per evaluation (see `counts`).
        decisions: of a finished run; default: what the triggers decide that need no measurement.
        rates: the machine's, for seconds.

    Raises:
        RunError: the training set has not even one batch.
        CostError: a step cannot be forecast.
    """
    batch, steps = train.batch, samples // (train.batch * train.accumulate) * train.accumulate
    if not steps:
        raise RunError(
            f"one training step takes {train.batch * train.accumulate} images, the training set has {samples}", where="train.batch"
        )
    options = train.forecast_options()
    bare = emit(plan.base)
    whole = forecast(bare, plan.base.input, batch, **options)
    tested = _forward(bare, plan.base.input, batch, train.amp)
    # As many batches, or parts of one.
    batches = (train.epochs // train.eval_every + (train.epochs % train.eval_every > 0)) * evaluated / batch
    before = _Sum(rates, batches, tested)
    before.train(whole, whole.forward_flops, whole.backward_flops, train.epochs * steps)
    run = _Sum(rates, batches, tested)
    phases: list[PhaseWork] = []
    earlier: Plan | None = None
    for start, end, new, current in plan.phases(train.epochs, decisions):
        step, filling, kept = _step(current, earlier, batch, samples, options)
        forward, backward = _expected(current, step)
        run.train(step, forward, backward, (end - start) * steps)
        fill = run.fill(*filling) if filling else 0
        run.feature_bytes = max(run.feature_bytes, kept)
        seconds = steps * run.step_seconds(step, forward + backward) if rates else None
        made = (start, end - start, new, steps * forward, steps * backward, fill, kept, step.peak_bytes, seconds, step)
        phases.append(PhaseWork(*made))
        earlier = current if kept else None
    foreseen = decisions is not None or all(value.when.foreseeable for value in plan.passes)
    return RunWork(samples, evaluated, train.epochs, before.work(), run.work(), tuple(phases), foreseen)


class _Sum:
    """Adds a run up."""

    def __init__(self, rates: Rates | None, evaluated: float, tested: Cost) -> None:
        self.rates = rates
        self.evaluation = int(evaluated * tested.forward_flops)
        self.seconds = evaluated * self._seconds(tested)
        self.training = self.backward = self.filling = self.feature_bytes = self.peak_bytes = 0

    def _seconds(self, cost: Cost) -> float:
        return self.rates.seconds(cost) if self.rates else 0.0

    def step_seconds(self, step: Cost, flops: int) -> float:
        """Of a step that takes `flops` on average: what is skipped at random saves time as it saves FLOPs."""
        return self._seconds(step) * (flops / step.flops if step.flops else 1.0)

    def train(self, step: Cost, forward: int, backward: int, steps: int) -> None:
        self.training += steps * forward
        self.backward += steps * backward
        self.peak_bytes = max(self.peak_bytes, step.peak_bytes)
        self.seconds += steps * self.step_seconds(step, forward + backward)

    def fill(self, cost: Cost, batches: float) -> int:
        """`batches` forward passes of a prefix; their FLOPs."""
        flops = int(batches * cost.forward_flops)
        self.filling += flops
        self.seconds += batches * self._seconds(cost)
        return flops

    def work(self) -> Work:
        forward = self.training + self.evaluation + self.filling
        seconds = self.seconds if self.rates else None
        return Work(forward, self.backward, self.training, self.evaluation, self.filling, self.feature_bytes, self.peak_bytes, seconds)


def _step(
    plan: Plan, earlier: Plan | None, batch: int, samples: int, options: Mapping[str, Any]
) -> tuple[Cost, tuple[Cost, float] | None, int]:
    """One training step; a batch of filling the cache that it begins with, and how many; and the bytes that are kept."""
    cut = plan.needs.features
    if cut is None or not (kept := cache_bytes(cut.node, cut.options, samples)):
        return forecast(plan.module, plan.graph.input, batch, targets=plan.needs.targets, **options), None, 0
    shape = tuple(cut.node.meta["val"].shape[1:])
    step = forecast(emit(plan.graph, start=cut.node), shape, batch, targets=plan.needs.targets, **options)
    old = earlier.needs.features if earlier is not None else None
    start = next((n for n in plan.graph.nodes if old is not None and n.name == old.node.name), None)
    if start is cut.node:
        return step, None, kept
    entered = tuple(start.meta["val"].shape[1:]) if start is not None else plan.graph.input
    fill = _forward(emit(plan.graph, start=start, stop=cut.node), entered, batch, options["amp"])
    return step, (fill, samples * (cut.options.get("views") or 1) / batch), kept


def cache_bytes(cut: fx.Node, options: Mapping[str, Any], samples: int) -> int:
    """Bytes that a cache at `cut` takes; 0 where it is over its limit and the prefix runs every time."""
    dtype = getattr(torch, options.get("dtype") or "float32")
    size = int(cut.meta["val"][0].numel()) * dtype.itemsize * samples * (options.get("views") or 1)
    limit = options.get("limit")
    return size if limit is None or size <= limit else 0


def _expected(plan: Plan, step: Cost) -> tuple[int, int]:
    """A step's FLOPs, less what blocks that are skipped at random save on average."""
    forward, backward = float(step.forward_flops), float(step.backward_flops)
    chances = {
        name: status.skip_probability
        for effect in plan.effects
        if effect is not None
        for name, status in effect.statuses.items()
        if status.skip_probability
    }
    if chances:
        by_name = {block.name: block for block in find_blocks(plan.base) if block.name in chances}
        for row in step.by(by_name.values()):
            forward -= chances.get(row.path, 0.0) * row.forward_flops
            backward -= chances.get(row.path, 0.0) * row.backward_flops
    return round(forward), round(backward)


def _forward(module: nn.Module, input: tuple[int, ...], batch: int, amp: str | None) -> Cost:
    return forecast(_NoBackward(module), input, batch, optimizer=None, amp=amp, loss=_first)


class _NoBackward(nn.Module):
    """A forward alone, as something that can be forecast: it has nothing to train and nothing to go backward through."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.unit = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.body(x)
        y = y if isinstance(y, torch.Tensor) else next(t for t in pytree.tree_leaves(y) if isinstance(t, torch.Tensor))
        return y.sum() * self.unit


def _first(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output


@dataclass(frozen=True)
class DropPoint:
    """A block after which a prefix may end, and the features that would be kept there of one sample, in float32."""

    name: str
    shape: tuple[int, ...]
    bytes_per_sample: int


def drop_points(graph: Graph) -> tuple[DropPoint, ...]:
    """The blocks that end at a cut point, in execution order."""
    cuts = {n for n in cut_points(graph) if n.meta["val"].shape[:1] == (SHAPE_BATCH,)}
    found = []
    for block in find_blocks(graph):
        end = block.exits[-1] if block.exits else None
        if end in cuts and end is not None:
            shape = tuple(end.meta["val"].shape[1:])
            found.append(DropPoint(block.name, shape, torch.Size(shape).numel() * 4))
    return tuple(found)


def decisions_of(folder: Path) -> tuple[Decision, ...]:
    """What a finished run decided, by its summary.json.

    Raises:
        RunError: the folder holds no finished run.
    """
    try:
        phases = json.loads((folder / "summary.json").read_text())["phases"]
        tables = [{k: v for k, v in d.items() if k != "pass"} for phase in phases for d in phase["decisions"]]
        return tuple(Decision(**{**d, "regions": None if d["regions"] is None else tuple(d["regions"])}) for d in tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError("there is no finished run here", where=str(folder), fix="Train it to its end first.") from error
