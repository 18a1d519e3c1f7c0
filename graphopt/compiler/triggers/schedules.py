"""Published schedules: triggers that follow from the length of the run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, StrictBool

from graphopt.compiler.triggers.base import BaseTrigger, Fired, LearningRate, RunSchedule, apply_missing

#: the class of each schedule, by the name that a spec gives it
SCHEDULES = {"freezeout": "FreezeOut", "progressive": "Progressive"}
_POWERS = {"linear": 1, "squared": 2, "cubic": 3}


class _Published(BaseTrigger):
    """A published schedule. The number of regions that it wants applied never falls.

    Attributes:
        schedule: its name.
    """

    schedule: str

    @pydantic.field_validator("schedule", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in [*SCHEDULES]:
            raise ValueError(f"schedule is {' or '.join(map(repr, SCHEDULES))}, found {value!r}")
        return value


class FreezeOut(_Published):
    """FreezeOut's schedule (arXiv 1706.04983): `when = { schedule = "freezeout", t0 = 0.8 }`.

    Region i of L (from 0, in execution order) stops training once the share t_i of the run is over: t_i = s(t0 + (1 - t0) i / L). What is
    not selected, the head, counts as region L and trains to the end. Until then a region goes through the run's own learning-rate schedule
    in its own time: with the cosine, its rate is base / t_i * (1 + cos(pi t / t_i)) / 2, and 0 from t_i on. Moments and rates are those of
    the step, not of the epoch.

    Attributes:
        t0: share of the run after which the first region fires, before `how` is applied.
        how: s above: "cubic", "squared" or "linear".
        anneal: lower each region's learning rate to the schedule's end at its t_i, where the pass freezes; else the run's own rate holds.
        scale: divide that rate by t_i, so that every region's rates have the same sum.
    """

    t0: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.8
    how: Literal["cubic", "squared", "linear"] = "cubic"
    anneal: StrictBool = True
    scale: StrictBool = True

    @pydantic.model_validator(mode="after")
    def _trains_again(self) -> FreezeOut:
        if self.anneal and (self.hold is not None or self.thaw is not None):
            raise ValueError("what hold or thaw undoes has no learning rate left to train with; give anneal = false, too")
        return self

    def end(self, i: int, count: int) -> float:
        """t_i, as a share of the run."""
        return (self.t0 + (1 - self.t0) * i / count) ** _POWERS[self.how]

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[float]:
        found = (self.end(i, len(names)) * epochs for i in range(len(names)))
        return (int(moment) if moment.is_integer() else moment for moment in found)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
        if epochs is None:
            return []
        return apply_missing(tuple(n for i, n in enumerate(names) if self.end(i, len(names)) * epochs <= epoch + 1e-9), active)

    def learning_rates(self, names: tuple[str, ...]) -> Mapping[str, LearningRate]:
        if not self.anneal:
            return {}
        ends = {name: self.end(i, len(names)) for i, name in enumerate(names)}
        return {name: partial(_compressed, end=end, factor=1 / end if self.scale and end else 1.0) for name, end in ends.items()}


def _compressed(time: float, schedule: RunSchedule, *, end: float, factor: float) -> float:
    """The run's schedule, gone through by `end`, times `factor`; 0 after that."""
    return factor * schedule(time / end) if time < end else 0.0


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

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[float]:
        def wanted(epoch: int) -> int:
            return sum(len(regions or ()) for _, regions in self.fire(names, (), epoch, epochs, None))

        return (bisect_left(range(epochs), count, key=wanted) for count in range(1, len(names) + 1))

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
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
        return apply_missing(tuple(reversed(added)), active)
