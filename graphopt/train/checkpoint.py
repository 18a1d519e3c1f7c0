"""The folder of a run and its checkpoints: what they hold, how they are saved, and how a run is restored from one.

A checkpoint holds state dicts, the spec, its digest, the decisions so far, and everything else on which the next step depends. No module
is ever pickled: structure comes from replaying (spec, decisions), and every file loads with `weights_only=True`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Data
from graphopt.data.randomness import random_states, restore_random_states
from graphopt.errors import RunError
from graphopt.files import link_atomically, lock_folder, reason, write_atomically
from graphopt.plan_file import check_digest, check_version
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train.evaluation import Meter
from graphopt.train.phase import Phase, RunContext
from graphopt.train.state import History, Progress, RunState

MANIFEST = "run.json"
FORMAT_VERSION = 1
#: settings that no training step depends on, and `epochs`: a longer schedule is a reason to resume
FREE = {
    "train": {"epochs", "device", "strategy", "compile", "channels_last", "deterministic"}
    | {"checkpoint_steps", "keep", "eval_every", "log_every"},
    "data": {"root", "workers", "eval_limit"},
}


class RunFolder:
    """The folder of one run: `run.json` (its manifest), `spec.toml`, `last.pt`, `best.pt`, `metrics.jsonl`, `summary.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self._lock: int | None = None

    @classmethod
    def claim(cls, path: str | os.PathLike[str], digest: str, spec: str, *, resume: bool) -> Self:
        """Takes `path` for a run. Raises RunError unless it is new, empty, or (with `resume`) the same spec's run, and used by no other."""
        folder, where = cls(Path(path)), os.fspath(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            entries = [entry.name for entry in folder.path.iterdir() if not entry.name.startswith(f".{MANIFEST}.")]
        except OSError as error:
            raise RunError(f"cannot be an output folder: {reason(error)}", where=where) from error
        manifest = read_manifest(folder.path) if entries else None
        if entries and manifest is None:
            raise RunError("the output folder holds files that are not a run of graphopt", where=where, fix="Choose a new folder")
        if manifest is not None:
            if not resume:
                fix = "Continue it with --resume, or choose a new folder"
                raise RunError("the output folder holds a run already", where=where, fix=fix)
            check_digest(manifest["digest"], digest, where, "Resume with the spec.toml inside the folder, or choose a new folder")
        try:
            folder._lock = lock_folder(folder.path)
        except BlockingIOError as error:
            raise RunError("another process is training in this folder", where=where) from error
        if manifest is None:
            write_atomically(folder.path / MANIFEST, json.dumps({"graphopt": FORMAT_VERSION, "digest": digest}) + "\n")
        write_atomically(folder.path / "spec.toml", spec)
        return folder

    def release(self) -> None:
        descriptor, self._lock = self._lock, None
        if descriptor is not None:
            os.close(descriptor)

    def save(self, state: Mapping[str, Any], *, best: bool = False, keep: int = 2, epoch: int | None = None) -> None:
        """Replaces `last.pt` by `state`, atomically, and with `best` also `best.pt`; `epoch` counts finished ones at the end of one.

        `keep` checkpoints stay: the last, the best (from 2 on), and from 3 on the latest epochs' (`epoch-0007.pt`).
        """
        write_atomically(self.last, lambda file: torch.save(dict(state), file))
        if best and keep > 1:
            link_atomically(self.last, self.best)
        if epoch is not None and keep > 2:
            link_atomically(self.last, self.path / f"epoch-{epoch:04d}.pt")
            for old in sorted(self.path.glob("epoch-*.pt"))[: 2 - keep]:
                old.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The content of a folder's `run.json`, or None where the folder is not a run."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "graphopt" in manifest and "digest" in manifest else None


class Checkpointer:
    """Saves the state of a run, and restores it. `spec` is its text, empty for a plan compiled by hand."""

    def __init__(self, folder: RunFolder, spec: str, train: TrainSpec, data: DataSpec | Data) -> None:
        self.folder, self.spec, self.keep = folder, spec, train.keep
        sources = data.model_dump(mode="json") if isinstance(data, DataSpec) else {"samples": len(data.train)}
        self.settings = {"train": train.model_dump(mode="json"), "data": sources}

    def save(self, state: RunState, *, metrics_offset: int, best: bool) -> None:
        """Writes a checkpoint; `metrics_offset` is the length of metrics.jsonl, `best` says whether it is the best so far."""
        plan, progress = state.phase.plan, state.progress
        content = {
            "graphopt": FORMAT_VERSION,
            "spec": self.spec,
            "digest": plan.digest,
            "decisions": [decision.model_dump(mode="json") for decision in plan.decisions],
            "settings": self.settings,
            "phase": state.phase.state_dict(),
            "progress": asdict(progress),
            "steps_per_epoch": state.phase.steps,
            "phases": state.phases,
            "history": state.history.state_dict(),
            "meter": state.meter.state_dict(),
            "window": state.window.state_dict(),
            "random": random_states(),
            "metrics_offset": metrics_offset,
        }
        self.folder.save(content, best=best, keep=self.keep, epoch=progress.epoch if not progress.step else None)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None. Raises RunError if it is damaged, or of a run with other settings on which steps depend."""
        if not self.folder.last.exists():
            return None
        saved = load_checkpoint(self.folder.last)
        changed = [
            f"{table}.{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for table, free in FREE.items()
            for old, new in [(saved["settings"][table], self.settings[table])]
            for key in sorted({*old, *new} - free)
            if old.get(key) != new.get(key)
        ]
        if changed:
            what = f"a run can only be resumed with the settings that it began with: {'; '.join(changed[:3])}"
            fix = "Restore them (the folder's spec.toml has them), or start a new run"
            raise RunError(what, where=str(self.folder.path), fix=fix)
        return saved

    def restore(self, saved: Mapping[str, Any], plan: Plan, context: RunContext) -> RunState:
        """The state in a checkpoint of `plan`; restores random generators, too. Raises RunError if network or data have changed."""
        decisions = [Decision.model_validate(d) for d in saved["decisions"]]
        phase = Phase(plan.advance_to(decisions) if decisions else plan, context)
        phase.load_state_dict(saved["phase"])
        progress = Progress(**saved["progress"])
        if progress.step and saved["steps_per_epoch"] != phase.steps:
            what = f"an epoch had {saved['steps_per_epoch']} steps and has {phase.steps} now, with {progress.step} of them done"
            raise RunError(what, where=str(self.folder.path), fix="The data has changed: restore it, or start a new run")
        meter, window = (Meter.from_state_dict(saved[name], context.strategy.device) for name in ("meter", "window"))
        state = RunState(phase, progress, History.from_state_dict(saved["history"]), list(saved["phases"]), meter, window)
        restore_random_states(saved["random"])
        return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, onto the CPU. Raises RunError if it is missing, damaged, or of another format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError("there is no checkpoint here", where=str(path)) from error
    except Exception as error:  # unpickling a damaged file may raise anything
        message = (str(error) or type(error).__name__).splitlines()[0]
        fix = "If best.pt is intact, export it; otherwise start the run again"
        raise RunError(f"is damaged or not a checkpoint: {message}", where=str(path), fix=fix) from error
    if not isinstance(state, dict) or "graphopt" not in state:
        raise RunError("is not a checkpoint of graphopt", where=str(path))
    check_version(state["graphopt"], FORMAT_VERSION, str(path))
    return state
