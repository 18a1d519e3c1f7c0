"""Triggers that wait for measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from graphopt.compiler.triggers.base import BaseTrigger, Fired, From0, From1, Share, Threshold, apply_missing

ScoreName = Literal["change", "continuation", "slope", "update"]
_BELOW = {"change": 0.02, "continuation": 0.5, "slope": 0.05, "update": 0.1}


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


def update(series: Sequence[float], _window: int) -> float:
    """How much the size of an epoch's update differs from that of the epoch before, relative to it; infinite in the first epoch.

    AutoFreeze (arXiv 2102.01386, section 4.1) takes the gradients that an interval has accumulated; this takes what the optimizer made of
    them, the change of the weights, which without momentum is the same up to the learning rate.
    """
    if len(series) < 2:
        return float("inf")
    before, last = series[-2:]
    return abs(last - before) / before if before > 0 else 0.0 if last == 0 else float("inf")


#: scores of convergence, from a region's changes of weights per epoch (oldest first) and a window in epochs. Learn&Drop (arXiv
#: 2604.23403) names the first three, but publishes neither formulas nor thresholds; those here are our own.
MEASURES: dict[str, Callable[[Sequence[float], int], float]] = {
    "change": change,
    "continuation": continuation,
    "slope": slope,
    "update": update,
}


class Score(BaseTrigger):
    """When the weights have converged, by measurement: `when = { score = "change", below = 0.02, patience = 2 }`.

    A region fires once it and all regions before it have been under every threshold for `patience` checks in a row, so regions fire in
    order from the input on. Weights are equal on all ranks, and so are the scores.

    With a `percentile` in the place of thresholds, a region is under it if its score is among the lowest of those that still train:
    `{ score = "update", percentile = 50, patience = 1 }` is AutoFreeze's criterion.

    Attributes:
        score: `"change"`, `"continuation"`, `"slope"`, `"update"`, or several, all of which must be under theirs.
        below: the threshold, or one for each score. Defaults: change 0.02, continuation 0.5, slope 0.05, update 0.1.
        percentile: of the scores of all regions that still train; a region must be below it.
        patience: checks in a row.
        every: epochs between checks.
        warmup: epochs at the start without checks (they still count for the largest change).
        window: epochs that a slope is computed over.
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

    def converged(self, series: list[float]) -> bool:
        """Whether a region whose change per epoch is `series` is under every threshold now."""
        scores = (MEASURES[name](series, self.window) for name in self.scores)
        return bool(series) and all(score < below for score, below in zip(scores, self.thresholds, strict=True))

    def under(self, series: list[float], check: int, training: Sequence[list[float]]) -> bool:
        """Whether a region was under every threshold before epoch `check`, or under the percentile of `training`, all that still train."""
        if self.thaw is not None and series[check - 1 : check] == [0.0]:
            return False  # it did not train then
        if self.percentile is None:
            return self.converged(series[:check])
        import numpy as np

        measured = [MEASURES[name] for name in self.scores]
        with np.errstate(invalid="ignore"):  # scores are infinite at first
            limits = [np.percentile([score(s[:check], self.window) for s in training], self.percentile) for score in measured]
        return all(score(series[:check], self.window) < limit for score, limit in zip(measured, limits, strict=True))

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
        # A region that has not been measured for that long cannot have converged.
        training = [s for name in names if name not in active and len(s := history.change(name)) >= epoch]
        for name in names[: self.cap(len(names), epoch, epochs)]:
            if name not in active:
                series = history.change(name)
                if len(series) < epoch or not all(self.under(series, check, training) for check in checks):
                    break
            found.append(name)
        return apply_missing(tuple(found), active)
