"""Triggers: rules for when a pass is applied. Each time one fires is a decision; the phases of a plan follow from decisions alone."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from graphopt.errors import PassError, did_you_mean

#: an action, and the names of the regions it is about (None: all)
Fired = tuple[Literal["apply", "undo"], tuple[str, ...] | None]

ScoreName = Literal["change", "continuation", "slope"]
Threshold = Annotated[float, Field(gt=0, strict=True)]
From0 = Annotated[int, Field(ge=0, strict=True)]
From1 = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
_BELOW = {"change": 0.02, "continuation": 0.5, "slope": 0.05}


class _Frozen(pydantic.BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Decision(_Frozen):
    """A trigger that fired: before `epoch`, pass number `index` (from 0) is applied or undone on `regions` (None: its whole selection)."""

    index: int
    epoch: int
    action: Literal["apply", "undo"] = "apply"
    regions: tuple[str, ...] | None = None


class BaseTrigger(_Frozen):
    """A rule that decides, before each epoch, to which regions a pass is applied, or undone."""

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        """What fires before `epoch`.

        Args:
            names: regions of the pass, in execution order. active: those it is applied to already.
            epoch: from 0. epochs: length of the run, if known. history: what the runner has measured so far, or None.
        """
        raise NotImplementedError

    def check(self, names: tuple[str, ...]) -> None:
        """Checks the trigger against the regions of its pass. Raises PassError if it names something else."""

    @property
    def foreseeable(self) -> bool:
        """Whether it fires without measurements, as the spec alone determines."""
        return True

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[int]:
        """The epochs of a run before which it may fire, if it is foreseeable; without asking every epoch of a long run."""
        return ()


class Start(BaseTrigger):
    """From the first step to the last: `when = "start"`."""

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        return []  # such a pass is active from the start


class AtEpoch(BaseTrigger):
    """From an epoch on, and optionally only until another: `when = { epoch = 10, until = 20 }`.

    Attributes:
        epoch: the first epoch that the pass is applied in; they count from 0.
        until: the first in which it is no longer.
    """

    epoch: From0
    until: From1 | None = None

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> AtEpoch:
        if self.until is not None and self.until <= self.epoch:
            raise ValueError(f"until = {self.until} must come after epoch = {self.epoch}")
        return self

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[int]:
        return (self.epoch,) if self.until is None else (self.epoch, self.until)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        on = self.epoch <= epoch and (self.until is None or epoch < self.until)
        return [] if on == bool(active) else [("apply" if on else "undo", None)]


class Step(_Frozen):
    """One entry of an explicit schedule.

    Attributes:
        epoch: the first epoch that it holds in; they count from 0.
        upto: name of the region up to which, it included, the pass is applied.
    """

    epoch: From0
    upto: Annotated[str, Field(min_length=1)]


class Steps(BaseTrigger):
    """An explicit schedule, to replay a published run: `when = [{ epoch = 3, upto = "layer1" }, { epoch = 5, upto = "layer2" }]`.

    Attributes:
        steps: their epochs rise, and each includes more regions than the one before.
    """

    steps: Annotated[tuple[Step, ...], Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Steps:
        for before, after in itertools.pairwise(self.steps):
            if after.epoch <= before.epoch:
                raise ValueError(f"epoch = {after.epoch} comes after epoch = {before.epoch}: a schedule's epochs must rise")
        return self

    def check(self, names: tuple[str, ...]) -> None:
        reached = -1
        for step in self.steps:
            if step.upto not in names:
                fix = did_you_mean(step.upto, names) or f"Its regions are {', '.join(names[:8])}"
                raise PassError(f"the schedule goes up to {step.upto!r}, which is not a region of this pass", where="when", fix=fix)
            if names.index(step.upto) <= reached:
                raise PassError(f"the schedule goes back to {step.upto!r} at epoch {step.epoch}", where="when", fix="Go further each time")
            reached = names.index(step.upto)

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[int]:
        return (step.epoch for step in self.steps)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        due = [s.upto for s in self.steps if s.epoch <= epoch]
        return _apply(names[: names.index(due[-1]) + 1], active) if due else []


def change(series: Sequence[float], _window: int) -> float:
    """The last epoch's change of the weights, relative to the weights."""
    return series[-1]


def continuation(series: Sequence[float], _window: int) -> float:
    """The last epoch's change over the largest one so far: 1.0 while a region changes as fast as ever."""
    largest = max(series)
    return series[-1] / largest if largest > 0 else 0.0


def slope(series: Sequence[float], window: int) -> float:
    """How fast the change itself changes: its absolute least-squares slope over the last `window` epochs, over the largest change so far.

    Infinite until there are `window` epochs.
    """
    recent = series[-window:]
    largest = max(series)
    if len(recent) < window:
        return float("inf")
    if largest == 0:
        return 0.0
    middle, mean = (window - 1) / 2, sum(recent) / window
    rise = sum((i - middle) * (value - mean) for i, value in enumerate(recent))
    return abs(rise / sum((i - middle) ** 2 for i in range(window))) / largest


#: scores of convergence, from a region's changes of weights per epoch (oldest first) and a window in epochs. Learn&Drop (arXiv
#: 2604.23403) names them, but publishes neither formulas nor thresholds; those here are our own.
MEASURES: dict[str, Callable[[Sequence[float], int], float]] = {"change": change, "continuation": continuation, "slope": slope}


class Score(BaseTrigger):
    """When the weights have converged, by measurement: `when = { score = "change", below = 0.02, patience = 2 }`.

    A region fires once it and all regions before it have been under every threshold for `patience` checks in a row, so regions fire in
    order from the input on. Weights are equal on all ranks, and so are the scores.

    Attributes:
        score: `"change"`, `"continuation"`, `"slope"`, or several, all of which must be under theirs.
        below: the threshold, or one for each score. Defaults: change 0.02, continuation 0.5, slope 0.05.
        patience: checks in a row.
        every: epochs between checks.
        warmup: epochs at the start without checks (they still count for the largest change).
        window: epochs that a slope is computed over.
        most: the largest number of regions that may ever fire: a count, or a share of all.
        by: the epoch (or share of the run) at which `most` may be reached; the limit grows linearly from `warmup` until then.
    """

    score: ScoreName | Annotated[tuple[ScoreName, ...], Field(min_length=1)]
    below: Threshold | tuple[Threshold, ...] | None = None
    patience: From1 = 2
    every: From1 = 1
    warmup: From0 = 0
    window: Annotated[int, Field(ge=2, strict=True)] = 3
    most: From1 | Share | None = None
    by: From1 | Share | None = None

    @pydantic.model_validator(mode="after")
    def _one_threshold_each(self) -> Score:
        if isinstance(self.below, tuple) and len(self.below) != len(self.scores):
            raise ValueError(f"below has {len(self.below)} thresholds for {len(self.scores)} scores")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of its scores."""
        return (self.score,) if isinstance(self.score, str) else self.score

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each of `scores`."""
        if self.below is None:
            return tuple(_BELOW[s] for s in self.scores)
        return self.below if isinstance(self.below, tuple) else (self.below,) * len(self.scores)

    @property
    def foreseeable(self) -> bool:
        """No: it waits for measurements."""
        return False

    def converged(self, series: list[float]) -> bool:
        """Whether a region whose change per epoch is `series` is under every threshold now."""
        scores = (MEASURES[name](series, self.window) for name in self.scores)
        return bool(series) and all(score < below for score, below in zip(scores, self.thresholds, strict=True))

    def cap(self, count: int, epoch: int, epochs: int | None) -> int:
        """How many of `count` regions may have fired before `epoch`."""
        most = count if self.most is None else self.most if isinstance(self.most, int) else int(self.most * count + 1e-9)
        if self.by is None or (isinstance(self.by, float) and epochs is None):
            return min(most, count)
        by = self.by if isinstance(self.by, int) else self.by * (epochs or 0)
        grown = 1.0 if epoch >= by else max(0.0, (epoch - self.warmup) / (by - self.warmup)) if by > self.warmup else 0.0
        return min(int(most * grown + 1e-9), count)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        if history is None or epoch % self.every:
            return []
        checks = range(epoch, epoch - self.patience * self.every, -self.every)
        if min(checks) <= self.warmup:
            return []
        found: list[str] = []
        for name in names[: self.cap(len(names), epoch, epochs)]:
            if name not in active:
                series = history.change(name)
                # A region that has not been measured for that long cannot have converged.
                if len(series) < epoch or not all(self.converged(series[:check]) for check in checks):
                    break
            found.append(name)
        return _apply(tuple(found), active)


class _Published(BaseTrigger):
    """A published schedule. The number of regions that it wants applied never falls.

    Attributes:
        schedule: its name.
    """

    schedule: str

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[int]:
        def wanted(epoch: int) -> int:
            return sum(len(regions or ()) for _, regions in self.fire(names, (), epoch, epochs, None))

        return (bisect_left(range(epochs), count, key=wanted) for count in range(1, len(names) + 1))

    @pydantic.field_validator("schedule", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in [*_SCHEDULES]:
            raise ValueError(f"schedule is {' or '.join(map(repr, _SCHEDULES))}, found {value!r}")
        return value


class FreezeOut(_Published):
    """FreezeOut's schedule (arXiv 1706.04983): `when = { schedule = "freezeout", t0 = 0.5 }`.

    Region i of L stops training once the share t_i of the run is over, with t_i = t0 + (1 - t0) i / L, cubed by default as the paper
    recommends. The paper also anneals each layer's learning rate to zero at its t_i, which a trigger cannot do: the run's own
    scheduler continues.

    Attributes:
        t0: share of the run after which the first region fires, before cubing.
        how: "cubic" or "linear".
    """

    t0: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.5
    how: Literal["cubic", "linear"] = "cubic"

    def end(self, i: int, count: int) -> float:
        """t_i, as a share of the run."""
        linear = self.t0 + (1 - self.t0) * i / count
        return linear**3 if self.how == "cubic" else linear

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        if epochs is None:
            return []
        return _apply(tuple(n for i, n in enumerate(names) if self.end(i, len(names)) * epochs <= epoch + 1e-9), active)


class Progressive(_Published):
    """Progressive layer dropping (arXiv 2010.13369, equations 5 and 6): `when = { schedule = "progressive", keep = 0.5 }`.

    It is for passes that skip regions at random. The expected number of skipped regions follows 1 - theta(t), with
    theta(t) = (1 - keep) exp(-gamma t) + keep and t the share of the run that is over. Regions are added from the deepest on, each with
    the skip probability that its pass gives it, once the schedule has room for all of it.

    Attributes:
        keep: the limit of theta.
        gamma: how fast theta falls; with the paper's 100 it reaches the limit within the first twentieth of the run.
    """

    keep: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.5
    gamma: Annotated[float, Field(gt=0, strict=True)] = 100.0

    def theta(self, time: float) -> float:
        """The deepest region's keep probability."""
        return (1 - self.keep) * math.exp(-self.gamma * time) + self.keep

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        if epochs is None:
            return []
        count = len(names)
        # Region i of L is skipped with a probability proportional to i; those of the added regions sum to what is due.
        due = (1 - self.theta(epoch / epochs)) / (1 - self.keep) * count * (count + 1) / 2
        added = []
        for i in range(count, 0, -1):
            due -= i
            if due < -1e-6 * count:
                break
            added.append(names[i - 1])
        return _apply(tuple(reversed(added)), active)


_SCHEDULES = {"freezeout": "FreezeOut", "progressive": "Progressive"}


def _apply(wanted: tuple[str, ...], active: tuple[str, ...]) -> list[Fired]:
    """One decision for the regions that should be active and are not yet."""
    missing = tuple(n for n in wanted if n not in active)
    return [("apply", missing)] if missing else []


def _from_short(value: Any) -> Any:
    """Short forms of a trigger in a spec: `"start"`, one step, or a list of steps."""
    if value == "start":
        return {}
    if isinstance(value, list | tuple):
        return {"steps": tuple(value)}
    if isinstance(value, dict) and "upto" in value:
        return {"steps": (value,)}
    return value


def _kind(value: Any) -> str:
    if isinstance(value, BaseTrigger):
        return type(value).__name__
    table = value if isinstance(value, dict) else {}
    if "schedule" in table:
        return _SCHEDULES.get(str(table["schedule"]), "FreezeOut")
    return next((kind for key, kind in _KEYS.items() if key in table), "Start")


def _to_short(trigger: BaseTrigger) -> Any:
    if isinstance(trigger, Start):
        return "start"
    table = trigger.model_dump(mode="json", exclude_none=True)
    return table["steps"] if isinstance(trigger, Steps) else table


#: the key by which a spec says which trigger it means
_KEYS = {"steps": "Steps", "epoch": "AtEpoch", "score": "Score"}

Trigger = Annotated[
    Annotated[Start, pydantic.Tag("Start")]
    | Annotated[AtEpoch, pydantic.Tag("AtEpoch")]
    | Annotated[Steps, pydantic.Tag("Steps")]
    | Annotated[Score, pydantic.Tag("Score")]
    | Annotated[FreezeOut, pydantic.Tag("FreezeOut")]
    | Annotated[Progressive, pydantic.Tag("Progressive")],
    pydantic.Discriminator(_kind),
    BeforeValidator(_from_short),
    PlainSerializer(_to_short, return_type=Any),
]


def active_regions(names: tuple[str, ...], trigger: BaseTrigger, index: int, decisions: tuple[Decision, ...]) -> tuple[str, ...]:
    """The regions a pass is applied to after `decisions`, in execution order."""
    if isinstance(trigger, Start):
        return names
    on: set[str] = set()
    for decision in decisions:
        if decision.index != index:
            continue
        regions = set(names if decision.regions is None else decision.regions)
        on = on | regions if decision.action == "apply" else on - regions
    return tuple(n for n in names if n in on)
