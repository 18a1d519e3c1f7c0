"""Triggers: when a pass fires. A trigger that fired is a decision, and decisions alone make the phases of a plan."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

Fired = tuple[Literal["apply", "undo"], tuple[str, ...] | None]


class Decision(pydantic.BaseModel):
    """A trigger that fired.

    Attributes:
        index: number of the pass in the spec, from 0.
        epoch: it holds from the start of this epoch on.
        action: the pass is applied, or taken back.
        regions: names of the regions it is about; None means the whole selection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    epoch: int
    action: Literal["apply", "undo"] = "apply"
    regions: tuple[str, ...] | None = None


class BaseTrigger(pydantic.BaseModel):
    """A rule that decides, before an epoch starts, what a pass applies or takes back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        """What fires before `epoch`.

        Args:
            names: regions of the pass, in execution order. active: those it is applied to already.
            epoch: from 0. epochs: length of the run, where known.
            history: what the runner measured so far (see `graphopt.train`), or None.
        """
        raise NotImplementedError

    @property
    def foreseeable(self) -> bool:
        """Whether the spec alone says when it fires (no measurement is needed)."""
        return True


class Start(BaseTrigger):
    """From the first step to the last: `when = "start"`."""

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        return []


class AtEpoch(BaseTrigger):
    """From an epoch on, and optionally only until another: `when = { epoch = 10, until = 20 }`. Epochs count from 0."""

    epoch: Annotated[int, Field(ge=0, strict=True)]
    until: Annotated[int, Field(ge=1, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> AtEpoch:
        if self.until is not None and self.until <= self.epoch:
            raise ValueError(f"until = {self.until} must come after epoch = {self.epoch}")
        return self

    def fire(self, names: tuple[str, ...], active: tuple[str, ...], epoch: int, epochs: int | None, history: Any) -> list[Fired]:
        on = self.epoch <= epoch and (self.until is None or epoch < self.until)
        if on and not active:
            return [("apply", None)]
        if active and not on:
            return [("undo", None)]
        return []


def _from_word(value: Any) -> Any:
    return {} if value == "start" else value


def _kind(value: Any) -> str:
    if isinstance(value, BaseTrigger):
        return type(value).__name__
    if isinstance(value, dict):
        for key, kind in _KEYS.items():
            if key in value:
                return kind
    return "Start"


#: the key that tells a trigger's kind in a spec
_KEYS = {"epoch": "AtEpoch"}

Trigger = Annotated[
    Annotated[Start, pydantic.Tag("Start")] | Annotated[AtEpoch, pydantic.Tag("AtEpoch")],
    pydantic.Discriminator(_kind),
    BeforeValidator(_from_word),
    PlainSerializer(lambda t: "start" if isinstance(t, Start) else t.model_dump(mode="json", exclude_none=True), return_type=Any),
]


def active_regions(names: tuple[str, ...], trigger: BaseTrigger, index: int, decisions: tuple[Decision, ...]) -> tuple[str, ...]:
    """The regions a pass is applied to after `decisions`, in execution order."""
    if isinstance(trigger, Start):
        return names
    on: set[str] = set()
    for decision in decisions:
        if decision.index != index:
            continue
        about = set(names) if decision.regions is None else set(decision.regions)
        on = on | about if decision.action == "apply" else on - about
    return tuple(n for n in names if n in on)
