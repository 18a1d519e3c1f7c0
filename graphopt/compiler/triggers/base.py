"""What every trigger is: a rule that decides to which regions a pass is applied, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field

#: an action, and the names of the regions it is about (None: all)
Fired = tuple[Literal["apply", "undo"], tuple[str, ...] | None]

Threshold = Annotated[float, Field(gt=0, strict=True)]
#: the run's own schedule: the learning rate after a share of the run (0 to 1), as a factor of the base rate
RunSchedule = Callable[[float], float]
#: a region's learning rate after a share of the run, as a factor of the base rate, given the run's own schedule
LearningRate = Callable[[float, RunSchedule], float]

From0 = Annotated[int, Field(ge=0, strict=True)]
From1 = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Points = Annotated[float, Field(gt=0, le=100, strict=True)]


class Frozen(pydantic.BaseModel):
    """A value that does not change, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Decision(Frozen):
    """A trigger that fired: before `epoch`, pass number `index` (from 0) is applied or undone on `regions` (None: its whole selection).

    An epoch that is no whole number is a moment within one: at 3.25, a quarter of the steps of epoch 3 are done.
    """

    index: int
    epoch: int | float
    action: Literal["apply", "undo"] = "apply"
    regions: tuple[str, ...] | None = None


class BaseTrigger(Frozen):
    """A rule that decides, before each epoch, to which regions a pass is applied, or undone.

    Attributes:
        hold: percentage points of held-out accuracy that the pass may cost, on top of the most that accuracy fell in the five evaluations
            before the pass. Once an evaluation with the pass applied is further below the best one before it, or after two that fall below
            that the next one would be, the pass is undone, and stays so.
        thaw: once the held-out loss is above its lowest so far by more than this share (0.05: 5 %), the pass is undone on all regions, and
            applied to none until the loss is back below that bound.

    Figures are compared at one size of the network's input only. Forecasts take it that neither bound is broken.
    """

    hold: Points | None = None
    thaw: Annotated[float, Field(ge=0, strict=True)] | None = None

    def decide(
        self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any, since: float | None
    ) -> list[Fired]:
        """As `fire`, but where a bound is broken the pass is undone. `since` is when it was applied first, None if it has not been."""
        if history is not None and (self._holds_no_more(history, since) or self._rose(history)):
            return [("undo", None)] if active else []
        return self.fire(names, active, epoch, epochs, history)

    def _holds_no_more(self, history: Any, since: float | None) -> bool:
        return self.hold is not None and since is not None and bool(history.fell(self.hold / 100, since))

    def _rose(self, history: Any) -> bool:
        losses = [] if self.thaw is None else history.figures("loss")
        return self.thaw is not None and bool(losses) and losses[-1] > (1 + self.thaw) * min(losses)

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: float, epochs: int | None, history: Any) -> list[Fired]:
        """What fires before `epoch`.

        Args:
            names: regions of the pass, in execution order. active: those it is applied to already.
            epoch: from 0; no whole number at a moment within an epoch, when `history` has the epochs before it.
            epochs: length of the run, if known. history: what the runner has measured so far, or None.
        """
        raise NotImplementedError

    def check(self, names: tuple[str, ...]) -> None:
        """Checks the trigger against the regions of its pass. Raises PassError if it names something else."""

    @property
    def foreseeable(self) -> bool:
        """Whether it fires without measurements, as the spec alone determines."""
        return True

    @property
    def compares_outputs(self) -> bool:
        """Whether it reads how far the outputs of its regions have moved since the epoch before (`History.plasticity`)."""
        return False

    def moments(self, names: tuple[str, ...], epochs: int) -> Iterable[float]:
        """When in a run it may fire, in epochs, if it is foreseeable; without asking every epoch of a long run."""
        return ()

    def learning_rates(self, names: tuple[str, ...]) -> Mapping[str, LearningRate]:
        """Learning rates of regions that it is about to stop, by their names; none by default. The pass says whether they are used."""
        return {}


def step_at(moment: float, steps: int) -> int:
    """The steps of a run that are done at a moment in epochs, with `steps` in each: a phase begins before the next one."""
    return math.ceil(moment * steps - 1e-9)


def apply_missing(wanted: tuple[str, ...], active: tuple[str, ...]) -> list[Fired]:
    """One decision for the regions that should be active and are not yet."""
    missing = tuple(n for n in wanted if n not in active)
    return [("apply", missing)] if missing else []
