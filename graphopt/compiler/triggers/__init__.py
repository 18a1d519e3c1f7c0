"""Triggers: rules for when a pass is applied. Each time one fires is a decision; the phases of a plan follow from decisions alone."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, PlainSerializer

from graphopt.compiler.triggers.base import BaseTrigger, Decision, Fired, LearningRate, RunSchedule, step_at
from graphopt.compiler.triggers.epochs import AtEpoch, Start, Step, Steps, rising_steps
from graphopt.compiler.triggers.schedules import SCHEDULES, FreezeOut, Progressive
from graphopt.compiler.triggers.scores import MEASURES, Score, change, continuation, plasticity, slope, update

__all__ = [
    "MEASURES",
    "AtEpoch",
    "BaseTrigger",
    "Decision",
    "Fired",
    "FreezeOut",
    "LearningRate",
    "Progressive",
    "RunSchedule",
    "Score",
    "Start",
    "Step",
    "Steps",
    "Trigger",
    "active_regions",
    "change",
    "continuation",
    "plasticity",
    "rising_steps",
    "slope",
    "step_at",
    "update",
]


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
        return SCHEDULES.get(str(table["schedule"]), "FreezeOut")
    return next((kind for key, kind in _KEYS.items() if key in table), "Start")


def _to_short(trigger: BaseTrigger) -> Any:
    if isinstance(trigger, Start):
        return "start"
    table = trigger.model_dump(mode="json", exclude_none=True)
    return table["steps"] if table.keys() == {"steps"} else table


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
