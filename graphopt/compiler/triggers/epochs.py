"""Triggers that a spec gives in epochs: from the start, at an epoch, or step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field

from graphopt.compiler.triggers.base import BaseTrigger, Fired, From0, From1, Frozen, apply_missing
from graphopt.errors import PassError, did_you_mean


class Start(BaseTrigger):
    """From the first step to the last: `when = "start"`."""

    @pydantic.model_validator(mode="after")
    def _nothing_to_undo(self) -> Start:
        if self.hold is not None or self.thaw is not None:
            raise ValueError("hold and thaw undo what is applied at an epoch; give that too, as in { epoch = 1, hold = 1.0 }")
        return self

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
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

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[float]:
        return (self.epoch,) if self.until is None else (self.epoch, self.until)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
        on = self.epoch <= epoch and (self.until is None or epoch < self.until)
        return [] if on == bool(active) else [("apply" if on else "undo", None)]


class Step(Frozen):
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

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[float]:
        return (step.epoch for step in self.steps)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
        due = [s.upto for s in self.steps if s.epoch <= epoch]
        return apply_missing(names[: names.index(due[-1]) + 1], active) if due else []


def rising_steps(names: Sequence[str], epochs: int) -> Iterator[Steps]:
    """Schedules over regions in execution order, mildest first: each begins earlier in a run of `epochs` and reaches further.

    A schedule takes its regions in three steps, spread evenly over what is left of the run.
    """
    found: list[Steps] = []
    for begin, reach in ((0.75, 0.5), (0.6, 0.6), (0.5, 0.75), (0.4, 0.9), (0.25, 1.0)):
        reached: dict[int, int] = {}
        for part in range(3):
            epoch = max(1, round(epochs * (begin + part * (1 - begin) / 3)))
            reached[epoch] = math.ceil(reach * len(names) * (part + 1) / 3)
        rising = {count: epoch for epoch, count in sorted(reached.items(), reverse=True) if 0 < count <= len(names) and epoch < epochs}
        steps = tuple(Step(epoch=epoch, upto=names[count - 1]) for count, epoch in sorted(rising.items()))
        if steps and (schedule := Steps(steps=steps)) not in found:
            found.append(schedule)
    yield from found
