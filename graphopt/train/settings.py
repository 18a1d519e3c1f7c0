"""Settings that may change when a run is resumed, and those that may not."""

from collections.abc import Mapping
from typing import Any

from graphopt.data.loader import Data
from graphopt.errors import RunError
from graphopt.spec import DataSpec, TrainSpec

#: settings that no training step depends on, and `epochs`: a longer schedule is a reason to resume
FREE = {
    "train": {
        *("epochs", "device", "strategy", "compile", "channels_last", "deterministic"),
        *("checkpoint_steps", "keep", "eval_every", "log_every"),
    },
    "data": {"root", "workers", "eval_limit"},
}


def resume_settings(train: TrainSpec, data: DataSpec | Data) -> dict[str, Any]:
    """What a checkpoint stores of the settings, as plain values."""
    return {
        "train": train.model_dump(mode="json"),
        "data": data.model_dump(mode="json") if isinstance(data, DataSpec) else {"samples": len(data.train)},
    }


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises RunError unless the settings on which training steps depend are those of the checkpoint."""
    changed = [
        f"{table}.{key} was {saved[table].get(key)!r} and is {now[table].get(key)!r}"
        for table in ("train", "data")
        for key in sorted({*saved[table], *now[table]} - FREE[table])
        if saved[table].get(key) != now[table].get(key)
    ]
    if changed:
        raise RunError(
            f"a run can only be resumed with the settings that it began with: {'; '.join(changed[:3])}",
            where=where,
            fix="Restore them (the folder's spec.toml has them), or start a new run",
        )
