"""What a run's folder holds: its spec, its decisions, and the records of its metrics."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.compiler.triggers import Decision
from graphopt.errors import RunError

_FIX = "Name the folder that `graphopt train` wrote"


@dataclass(frozen=True)
class Run:
    """One run, finished or not: what `run.json`, `spec.toml`, `metrics.jsonl` and `summary.json` hold.

    Attributes:
        epochs, steps, phases: the records of metrics.jsonl by kind, in order. summary: None while the run goes on.
    """

    path: Path
    epochs: tuple[Mapping[str, Any], ...]
    steps: tuple[Mapping[str, Any], ...]
    phases: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] | None

    @property
    def spec(self) -> Path:
        """The spec as it was trained."""
        return self.path / "spec.toml"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All that was decided, in order."""
        records = (d for phase in self.phases for d in phase.get("decisions", ()))
        return tuple(dict.fromkeys(Decision.model_validate({k: d[k] for k in d if k in Decision.model_fields}) for d in records))


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run."""
    return path.is_dir() and (path / "run.json").is_file()


def read_run(path: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        RunError: the folder does not exist, is not a run, or its metrics cannot be read.
    """
    if not path.exists():
        raise RunError("no such folder", where=str(path), fix=_FIX)
    if not path.is_dir():
        raise RunError("a file, not the folder of a run", where=str(path), fix=_FIX)
    if not (path / "run.json").is_file() or not (path / "spec.toml").is_file():
        raise RunError("no run of graphopt: it has no run.json and spec.toml", where=str(path), fix=_FIX)
    records = _records(path / "metrics.jsonl")
    summary = _text(path / "summary.json")
    try:
        finished = json.loads(summary) if summary else None
    except ValueError as error:
        raise RunError("not JSON", where=str(path / "summary.json"), fix="Remove it, or resume the run") from error
    return Run(path, tuple(records["epoch"]), tuple(records["step"]), tuple(records["phase"]), finished)


def _records(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The records of a metrics file by kind; a last line that was cut off in writing is passed over."""
    records: dict[str, list[Mapping[str, Any]]] = {"epoch": [], "step": [], "phase": []}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
            kind = record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            if line.endswith("}"):
                raise RunError("not a line of metrics", where=f"{path}:{number}", fix="Remove the line") from error
            continue
        if kind in records:
            records[kind].append(record)
    return records


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot be read: {error}", where=str(path)) from error
