"""What a whole run costs: the forecast of one step, integrated over phases; evaluation and the filling of feature caches counted in.

`graphopt.cost.integrate` adds up training steps; this is the runner's account, which knows what else a run computes. Phases come from
decisions: a spec's own, where its triggers are known beforehand, or those of a finished run, where they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from graphopt.cost import Cost, forecast
from graphopt.errors import RunError
from graphopt.rewriting import Decision, Plan, emit
from graphopt.spec import DataSpec, TrainSpec
from graphopt.trace import Graph
from graphopt.trace.graph import SHAPE_BATCH

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
    """FLOPs (2 per multiply-accumulate) of a run, or of a part of it.

    Attributes:
        forward_flops, backward_flops: everything, evaluation and cache filling included.
        training_forward_flops: of training steps alone; their backward is `backward_flops`, there is no other.
        evaluation_forward_flops: the full network over the evaluation split, as often as the run evaluates.
        filling_forward_flops: prefixes over the training set, once per drop and view.
        feature_bytes: the largest cache that the run keeps.
    """

    forward_flops: int
    backward_flops: int
    training_forward_flops: int
    evaluation_forward_flops: int
    filling_forward_flops: int
    feature_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class PhaseWork:
    """One phase: its epochs, what began it, its FLOPs per epoch of training, and the bytes it keeps."""

    epoch: int
    epochs: int
    decisions: tuple[Decision, ...]
    forward_flops: int
    backward_flops: int
    filling_flops: int
    feature_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "decisions": [d.model_dump(mode="json") for d in self.decisions]}


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
        from graphopt.train.sources import open_split

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
) -> RunWork:
    """The FLOPs of a run of `plan` (as compiled, before any decision).

    Args:
        train: the run: epochs, batch, how often it evaluates.
        samples, evaluated: images per epoch and per evaluation (see `counts`).
        decisions: of a finished run; default: what the triggers decide that need no measurement.

    Raises:
        RunError: the training set has not even one batch.
    """
    batch, steps = train.batch, samples // (train.batch * train.accumulate) * train.accumulate
    if not steps:
        raise RunError(
            f"one training step takes {train.batch * train.accumulate} images, the training set has {samples}", where="train.batch"
        )
    options: dict[str, Any] = {"optimizer": None, "amp": train.amp}
    whole = forecast(emit(plan.base), plan.base.input, batch, **options)
    evaluations = train.epochs // train.eval_every + (train.epochs % train.eval_every > 0)
    evaluation = evaluations * evaluated * whole.forward_flops // batch
    before = _work(train.epochs * steps * whole.forward_flops, train.epochs * steps * whole.backward_flops, evaluation, 0)
    foreseen = decisions is not None or all(value.when.foreseeable for value in plan.passes)
    begun = _phases(plan, train.epochs, decisions)
    phases: list[PhaseWork] = []
    earlier: Plan | None = None
    for (epoch, new, phase), end in zip(begun, [*(e for e, _, _ in begun[1:]), train.epochs], strict=True):
        step, fill, kept = _step(phase, earlier, batch, samples, options)
        forward, backward = _expected(phase, step)
        phases.append(PhaseWork(epoch, end - epoch, new, steps * forward, steps * backward, fill, kept))
        earlier = phase if kept else None
    run = _work(
        sum(p.epochs * p.forward_flops for p in phases),
        sum(p.epochs * p.backward_flops for p in phases),
        evaluation,
        sum(p.filling_flops for p in phases),
        max(p.feature_bytes for p in phases),
    )
    return RunWork(samples, evaluated, train.epochs, before, run, tuple(phases), foreseen)


def _work(training: int, backward: int, evaluation: int, filling: int, kept: int = 0) -> Work:
    return Work(training + evaluation + filling, backward, training, evaluation, filling, kept)


def _phases(plan: Plan, epochs: int, decisions: Sequence[Decision] | None) -> list[tuple[int, tuple[Decision, ...], Plan]]:
    """(first epoch, what began it, the plan) of each phase."""
    found: list[tuple[int, tuple[Decision, ...], Plan]] = []
    taken: tuple[Decision, ...] = ()
    for epoch in range(epochs):
        if decisions is None:
            new = plan.due(epoch, None, epochs)
        else:
            new = tuple(d for d in decisions if d.epoch == epoch)
        if new or not found:
            taken = (*taken, *new)
            plan = plan.at(taken, verify="off") if taken else plan
            found.append((epoch, new, plan))
    return found


def _step(plan: Plan, earlier: Plan | None, batch: int, samples: int, options: Mapping[str, Any]) -> tuple[Cost, int, int]:
    """One training step, the FLOPs of filling the cache it begins with, and the bytes that are kept."""
    cut = plan.needs.features
    if cut is None or not (kept := cache_bytes(cut.node, cut.options, samples)):
        return forecast(plan.module, plan.graph.input, batch, targets=plan.needs.targets, **options), 0, 0
    shape = tuple(cut.node.meta["val"].shape[1:])
    step = forecast(emit(plan.graph, start=cut.node), shape, batch, targets=plan.needs.targets, **options)
    old = earlier.needs.features if earlier is not None else None
    start = next((n for n in plan.graph.nodes if old is not None and n.name == old.node.name), None)
    if start is cut.node:
        return step, 0, kept
    entered = tuple(start.meta["val"].shape[1:]) if start is not None else plan.graph.input
    fill = forecast(_Scalar(emit(plan.graph, start=start, stop=cut.node)), entered, batch, loss=_first, **options).forward_flops
    return step, fill * samples * (cut.options.get("views") or 1) // batch, kept


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
        name: mark.detail["probability"]
        for effect in plan.effects
        if effect is not None
        for name, mark in effect.marks.items()
        if mark.status == "bypassed" and "probability" in mark.detail
    }
    if chances:
        by_name = {block.name: block for block in plan.base.blocks() if block.name in chances}
        for row in step.by(by_name.values()):
            forward -= chances.get(row.path, 0.0) * row.forward_flops
            backward -= chances.get(row.path, 0.0) * row.backward_flops
    return round(forward), round(backward)


class _Scalar(nn.Module):
    """A prefix for a forecast: it has nothing to train and nothing to go backward through."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.unit = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.body(x)
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
    cuts = {n for n in graph.cut_points() if n.meta["val"].shape[:1] == (SHAPE_BATCH,)}
    found = []
    for block in graph.blocks():
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
