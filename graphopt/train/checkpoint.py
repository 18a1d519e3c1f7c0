"""Checkpoints: what they hold, how they are saved, and how a run is restored from one.

A checkpoint holds state dicts, the spec, its digest, the decisions so far, and everything else on which the next step depends. No module
is ever pickled: structure comes from replaying (spec, decisions), and every file loads with `weights_only=True`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Data
from graphopt.data.randomness import random_states, restore_random_states
from graphopt.errors import RunError
from graphopt.plan_file import check_version
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train.evaluation import Meter
from graphopt.train.history import History
from graphopt.train.phase import Phase, RunContext
from graphopt.train.run_folder import FORMAT_VERSION, RunFolder
from graphopt.train.state import Progress, RunState

#: settings that no training step depends on, and `epochs`: a longer schedule is a reason to resume
FREE = {
    "train": {
        *("epochs", "device", "strategy", "compile", "channels_last", "deterministic"),
        *("checkpoint_steps", "keep", "eval_every", "log_every"),
    },
    "data": {"root", "workers", "eval_limit"},
}


class Checkpointer:
    """Saves the state of a run, and restores it.

    Args:
        spec: its text, empty for a plan compiled by hand.
    """

    def __init__(self, folder: RunFolder, spec: str, train: TrainSpec, data: DataSpec | Data) -> None:
        self.folder, self.spec, self.keep = folder, spec, train.keep
        sources = data.model_dump(mode="json") if isinstance(data, DataSpec) else {"samples": len(data.train)}
        self.settings = {"train": train.model_dump(mode="json"), "data": sources}

    def save(self, state: RunState, *, metrics_offset: int, best: bool) -> None:
        """Writes a checkpoint.

        Args:
            metrics_offset: length of metrics.jsonl.
            best: whether it is the best so far.
        """
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
        """The last checkpoint, on the CPU; None where a run stopped before its first.

        Raises:
            RunError: it cannot be read, or the run began with other settings on which training steps depend.
        """
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
        """The state in a checkpoint of `plan`, and the state of all random generators.

        Raises:
            RunError: the network or the data is not what it was.
        """
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
    """Reads a checkpoint with `weights_only=True`, onto the CPU.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
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
