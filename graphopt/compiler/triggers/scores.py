"""Triggers that wait for measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from graphopt.compiler.triggers.base import BaseTrigger, Fired, From0, From1, Share, Threshold, apply_missing

ScoreName = Literal["change", "continuation", "slope", "update", "plasticity"]
_BELOW = {"change": 0.02, "continuation": 0.5, "slope": 0.05, "update": 0.1, "plasticity": 0.2}
#: from a score's name to how far a region has moved in each epoch, oldest first
Series = Mapping[str, list[float]]


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
    return _slope(recent) / largest


def update(series: Sequence[float], _window: int) -> float:
    """How much the size of an epoch's update differs from that of the epoch before, relative to it; infinite in the first epoch.

    AutoFreeze (arXiv 2102.01386, section 4.1) takes the gradients that an interval has accumulated; this takes what the optimizer made of
    them, the change of the weights, which without momentum is the same up to the learning rate.
    """
    if len(series) < 2:
        return float("inf")
    before, last = series[-2:]
    return abs(last - before) / before if before > 0 else 0.0 if last == 0 else float("inf")


def plasticity(series: Sequence[float], window: int) -> float:
    """How fast the plasticity of the outputs still changes: its absolute slope over the last `window` epochs, over the steepest so far.

    Infinite until there are `window` epochs that can be compared with those before them. Egeria (arXiv 2201.06227) freezes by such a
    slope; that it is taken relative to the steepest is our own.
    """
    slopes = [_slope(series[end - window : end]) for end in range(window, len(series) + 1)]
    known = [value for value in slopes if isfinite(value)]
    if not known or not isfinite(slopes[-1]):
        return float("inf")
    return slopes[-1] / max(known) if max(known) > 0 else 0.0


def _slope(values: Sequence[float]) -> float:
    """The absolute least-squares slope; no number where a value is infinite."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    rise = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return abs(rise / sum((i - middle) ** 2 for i in range(len(values))))


#: scores of convergence, from a region's movements per epoch (oldest first) and a window in epochs: its changes of weights, for
#: `plasticity` those of its outputs. Learn&Drop (arXiv 2604.23403) names the first three, but publishes neither formulas nor thresholds;
#: those here are our own.
MEASURES: dict[str, Callable[[Sequence[float], int], float]] = {
    "change": change,
    "continuation": continuation,
    "slope": slope,
    "update": update,
    "plasticity": plasticity,
}


class Score(BaseTrigger):
    """When the weights have converged, by measurement: `when = { score = "change", below = 0.02, patience = 2 }`.

    A region fires once it and all regions before it have been under every threshold for `patience` checks in a row, so regions fire in
    order from the input on. Weights are equal on all ranks, and so are the scores.

    With a `percentile` in the place of thresholds, a region is under it if its score is among the lowest of those that still train:
    `{ score = "update", percentile = 50, patience = 1 }` is AutoFreeze's criterion. `{ score = "plasticity" }` is Egeria's: it goes by what
    regions give for the first images of the evaluation data, not by their weights.

    Attributes:
        score: `"change"`, `"continuation"`, `"slope"`, `"update"`, `"plasticity"`, or several, all of which must be under theirs.
        below: the threshold, or one for each score. Defaults: change 0.02, continuation 0.5, slope 0.05, update 0.1, plasticity 0.2.
        percentile: of the scores of all regions that still train; a region must be below it.
        patience: checks in a row.
        every: epochs between checks.
        warmup: epochs at the start without checks (they still count for the largest change).
        window: epochs that a slope is computed over, of changes or of plasticity.
        most: the largest number of regions that may ever fire: a count, or a share of all.
        by: the epoch (or share of the run) at which `most` may be reached; the limit grows linearly from `warmup` until then.
    """

    score: ScoreName | Annotated[tuple[ScoreName, ...], Field(min_length=1)]
    below: Threshold | tuple[Threshold, ...] | None = None
    percentile: Annotated[float, Field(gt=0, lt=100, strict=True)] | None = None
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
        if self.percentile is not None and self.below is not None:
            raise ValueError("give one of below and percentile")
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

    @property
    def compares_outputs(self) -> bool:
        """Whether one of its scores is of outputs."""
        return "plasticity" in self.scores

    def converged(self, series: Series) -> bool:
        """Whether a region that has moved like that is under every threshold now."""
        scores = [MEASURES[name](series[name], self.window) if series[name] else float("inf") for name in self.scores]
        return all(score < below for score, below in zip(scores, self.thresholds, strict=True))

    def under(self, series: Series, epochs: int, training: Sequence[Series]) -> bool:
        """Whether a region was under every threshold after `epochs`, or under the percentile of `training`, all that still train."""
        past = {name: values[:epochs] for name, values in series.items()}
        if self.thaw is not None and any(values[-1:] == [0.0] for values in past.values()):
            return False  # it did not train then
        if self.percentile is None:
            return self.converged(past)
        import numpy as np

        with np.errstate(invalid="ignore"):  # scores are infinite at first
            limits = {n: np.percentile([MEASURES[n](s[n][:epochs], self.window) for s in training], self.percentile) for n in self.scores}
        return all(MEASURES[name](past[name], self.window) < limit for name, limit in limits.items())

    def cap(self, count: int, epoch: float, epochs: int | None) -> int:
        """How many of `count` regions may have fired before `epoch`."""
        most = count if self.most is None else self.most if isinstance(self.most, int) else int(self.most * count + 1e-9)
        if self.by is None or (isinstance(self.by, float) and epochs is None):
            return min(most, count)
        by = self.by if isinstance(self.by, int) else self.by * (epochs or 0)
        grown = 1.0 if epoch >= by else max(0.0, (epoch - self.warmup) / (by - self.warmup)) if by > self.warmup else 0.0
        return min(int(most * grown + 1e-9), count)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
        if history is None or epoch % self.every:  # within an epoch, too
            return []
        epoch = int(epoch)
        checks = range(epoch, epoch - self.patience * self.every, -self.every)
        if min(checks) <= self.warmup:
            return []
        found: list[str] = []
        training = {name: self._series(history, name) for name in names if name not in active}
        # A region that has not been measured for that long cannot have converged.
        training = {name: series for name, series in training.items() if min(map(len, series.values())) >= epoch}
        for name in names[: self.cap(len(names), epoch, epochs)]:
            if name not in active:
                series = training.get(name)
                if series is None or not all(self.under(series, check, tuple(training.values())) for check in checks):
                    break
            found.append(name)
        return apply_missing(tuple(found), active)

    def _series(self, history: Any, region: str) -> Series:
        """How far the region has moved in each epoch, by the names of the scores."""
        return {name: history.plasticity(region) if name == "plasticity" else history.change(region) for name in self.scores}
