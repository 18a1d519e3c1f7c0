"""Which of a run's settings may change when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.data.loader import Data
from graphopt.errors import RunError
from graphopt.spec import DataSpec, TrainSpec

#: Where and how often, rather than what: none of these changes a step. More epochs are a longer schedule, and a wish.
FREE = {
    "train": {
        *("epochs", "device", "strategy", "compile", "channels_last", "deterministic"),
        *("checkpoint_steps", "keep", "eval_every", "log_every"),
    },
    "data": {"root", "workers", "download", "eval_limit"},
}


def settings_table(train: TrainSpec, data: DataSpec | Data) -> dict[str, Any]:
    """What a checkpoint remembers of the settings, as plain values."""
    return {
        "train": train.model_dump(mode="json"),
        "data": data.model_dump(mode="json") if isinstance(data, DataSpec) else {"samples": len(data.train)},
    }


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise RunError when a setting that the steps depend on is not what it was; the result would be neither run's."""
    changed = [
        f"{table}.{key} was {saved[table].get(key)!r} and is {now[table].get(key)!r}"
        for table in ("train", "data")
        for key in sorted({*saved[table], *now[table]} - FREE[table])
        if saved[table].get(key) != now[table].get(key)
    ]
    if changed:
        raise RunError(
            f"a run resumes with what it began with: {'; '.join(changed[:3])}",
            where=where,
            fix="Set it back (the folder's spec.toml has it), or start a new run.",
        )
