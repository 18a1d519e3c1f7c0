"""Checkpoints of a run: what they hold, how they are saved, and how a run is restored from one.

A checkpoint holds state dicts, the spec, its digest, the decisions so far, and everything else on which the next step depends. No module
is ever pickled: structure comes from replaying (spec, decisions), and every file loads with `weights_only=True`.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Data
from graphopt.errors import RunError
from graphopt.files import (
    link_atomically,
    reason,
)
from graphopt.hashing import content_digest
from graphopt.plan_file import check_digest, check_version
from graphopt.runtime.shards import copied
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train.evaluation import Meter
from graphopt.train.folder import RunFolder
from graphopt.train.parts import Shard, split
from graphopt.train.parts import read as read_parts
from graphopt.train.parts import write as write_parts
from graphopt.train.phase import Phase, RunContext
from graphopt.train.ranks import ALONE, Ranks
from graphopt.train.state import History, Progress, RunState
from graphopt.train.strategy import Strategy

FORMAT_VERSION = 6  # of checkpoints
#: settings that no training step depends on, and `epochs`: a longer schedule is a reason to resume
FREE = {
    "train": {"epochs", "device", "strategy", "fsdp", "replicas", "timeout", "compile", "channels_last", "deterministic"}
    | {"checkpoint_format", "checkpoint_async", "checkpoint_steps", "keep", "eval_every", "log_every", "ledger"},
    "data": {"root", "workers", "cache", "eval_limit"},
}


class Checkpointer:
    """Saves the state of a run, and restores it. `spec` is its text, empty for a plan compiled by hand.

    With `train.checkpoint_async`, a thread writes a copy of the state, one checkpoint after the other.
    """

    def __init__(self, folder: RunFolder, spec: str, train: TrainSpec, data: DataSpec | Data, strategy: Strategy) -> None:
        self.folder, self.spec, self.keep, self.ranks = folder, spec, train.keep, strategy.ranks
        self._shard, ranks = strategy.shard, strategy.ranks
        # Of all strategies, only fsdp has tensors in parts; the others' ranks give rank 0 what it does not hold itself.
        self.sharded = train.checkpoint_format == "sharded" and train.strategy == "fsdp" and ranks.count > 1
        self._writing = ranks.apart() if self.sharded else ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving") if train.checkpoint_async else None
        self._pending: Future[None] | None = None
        self.source: Path | None = None  # the checkpoint that the run continues from
        self._epoch: int | None = None  # the epoch at whose end that was written
        sources = data.model_dump(mode="json") if isinstance(data, DataSpec) else {"samples": len(data.train)}
        settings = train.model_dump(mode="json")
        self.settings = {"train": {**settings, "fsdp.precision": settings["fsdp"]["precision"]}, "data": sources}

    def save(self, state: RunState, *, metrics_offset: int, best: bool) -> None:
        """Writes a checkpoint; `metrics_offset` is the length of metrics.jsonl, `best` says whether it is the best so far.

        All ranks have to call it; rank 0 writes, and with `train.checkpoint_format = "sharded"` every rank its part of sharded tensors.
        An asynchronous save waits for the one before, and raises what went wrong with that.
        """
        self.finish()
        plan, progress, ranks = state.phase.plan, state.progress, self.ranks
        meters = {"meter": state.meter.over(ranks).state_dict(), "window": state.window.over(ranks).state_dict()}
        buffers = state.phase.buffers_by_rank()
        if self.sharded:
            phase, sharded = split(state.phase.own_state())
        else:
            phase, sharded = state.phase.state_dict(keep=ranks.first), {}
        content = {
            "graphopt": FORMAT_VERSION,
            "spec": self.spec,
            "digest": plan.digest,
            "decisions": [decision.model_dump(mode="json") for decision in plan.decisions],
            "settings": self.settings,
            "phase": phase,
            "progress": asdict(progress),
            "steps_per_epoch": state.phase.steps,
            "phases": state.phases,
            "history": state.history.state_dict(),
            **meters,
            "buffers": buffers,
            "metrics_offset": metrics_offset,
        }
        tensors = {("phase", *keys): tensor for keys, tensor in sharded.items()}
        options = {"best": best, "keep": self.keep, "epoch": progress.epoch - 1 if not progress.step else None}
        if self._thread is None:
            self._write(content, tensors, options)
        else:
            content, tensors = copied(content) if ranks.first else content, copied(tensors)
            self._pending = self._thread.submit(self._write, content, tensors, options)

    def _write(self, content: dict[str, Any], tensors: Mapping[tuple[str, ...], Tensor], options: Mapping[str, Any]) -> None:
        parts = write_parts(self.folder.path, content["progress"]["total"], tensors, self._writing)
        if self.ranks.first:
            self.folder.save({**content, "parts": parts}, **options)

    def raise_failure(self) -> None:
        """Raises what went wrong with an asynchronous save, as soon as that is known."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Waits for an asynchronous save, and raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for an asynchronous save, so that the folder is the run's until it is over; what else has gone wrong is said already."""
        if self._thread is not None:
            self._thread.shutdown()

    def load(self, digest: str) -> tuple[dict[str, Any] | None, str | None]:
        """The last whole checkpoint of the run with this digest, or None; and a message if the last one is damaged or the spec has changed.

        All ranks have to call it: rank 0 reads it for all ranks, and each rank some of its parts.
        Raises RunError if all are damaged, or if the run began with other settings on which steps depend.
        """
        if not self.ranks.broadcast(bool(self.folder.checkpoints()) if self.ranks.first else None):
            return None, None
        path, saved, message = load_whole(self.folder, self.folder.last, digest, self.ranks, self._shard)
        check_digest(saved["digest"], digest, str(path), "Remove it, and continue with --resume")
        changed, allowed = self._changed(saved)
        if changed:
            what = f"a run can only be resumed with the settings that it began with: {'; '.join(changed[:3])}"
            fix = "Restore them (the folder's spec.toml has them), or start a new run"
            raise RunError(what, where=str(self.folder.path), fix=fix)
        self.source = path
        self._epoch = saved["progress"]["epoch"] - 1 if not saved["progress"]["step"] else None
        return saved, "; ".join([*([message] if message else []), *allowed]) or None

    def _changed(self, saved: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """What of the settings is not as it was in a checkpoint, in words: what steps depend on, and the rest of the spec."""
        found: tuple[list[str], list[str]] = [], []
        for table, free in FREE.items():
            for key, change in _changes(table, saved["settings"][table], self.settings[table]):
                found[key in free].append(change)
        if not any(found) and saved["spec"] != self.spec:
            lines = set(saved["spec"].splitlines()) ^ set(self.spec.splitlines())
            found[1].append(f"the spec was changed in {', '.join(sorted({line.partition('=')[0].strip() for line in lines}))}")
        return found

    def begin(self, digest: str) -> None:
        """Makes the folder the run's; a damaged last checkpoint is replaced by the one that the run continues from."""
        if not self.ranks.first:
            return
        self.folder.begin(digest, self.spec)
        if self.source is not None and self.source != self.folder.last:
            # A process that was killed in its first save may have left this one under some of its names only.
            if self.keep > 2 and self._epoch is not None and not self.folder.epoch_path(self._epoch).exists():
                link_atomically(self.source, self.folder.epoch_path(self._epoch))
            link_atomically(self.source, self.folder.last)

    def restore(self, saved: Mapping[str, Any], plan: Plan, context: RunContext) -> RunState:
        """The state in a checkpoint of `plan`; restores random generators, too. Raises RunError if network or data have changed."""
        decisions = [Decision.model_validate(d) for d in saved["decisions"]]
        phase = Phase(plan.advance_to(decisions) if decisions else plan, context)
        phase.load_state_dict(saved["phase"])
        progress = Progress(**saved["progress"])
        if progress.step and saved["steps_per_epoch"] != phase.steps:
            what = f"an epoch had {saved['steps_per_epoch']} steps and has {phase.steps} now, with {progress.step} of them done"
            raise RunError(what, where=str(self.folder.path), fix="The data has changed: restore it, or start a new run")
        phase.load_buffers(saved["buffers"])
        # What all ranks had counted together, rank 0 goes on with.
        counted = saved if self.ranks.first else {"meter": Meter().state_dict(), "window": Meter().state_dict()}
        meter, window = (Meter.from_state_dict(counted[name], context.strategy.device) for name in ("meter", "window"))
        state = RunState(phase, progress, History.from_state_dict(saved["history"]), list(saved["phases"]), meter, window)
        return state


def _changes(table: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that differ, key by key, those in tables inside of a table too: the key in `table`, and the change in words."""
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from ((key, text) for _, text in _changes(f"{table}.{key}", was, now))
        elif was != now:
            yield key, f"{table}.{key} was {was!r} and is {now!r}"


def load_checkpoint(path: Path, ranks: Ranks = ALONE, shard: Shard | None = None) -> dict[str, Any]:
    """Reads a checkpoint, onto the CPU. Raises RunError if it is missing, damaged, or of another format.

    All `ranks` have to call it: rank 0 reads the file for all, each rank some of its parts, as `graphopt.train.parts.read` says.
    The error names the run's other checkpoints that are whole.
    """
    try:
        return _loaded(path, ranks, shard)
    except RunError as error:  # on every rank
        folder = RunFolder(path.parent)
        if error.fix is None and not folder.has(path):
            raise RunError(error.what, where=error.where, fix="Name the folder of a run, or a checkpoint in it") from error
        others = [other.name for other in folder.checkpoints() if not _same(other, path) and _is_whole(other)]
        raise _advised(error, ranks.broadcast(others)) from error


def load_whole(
    folder: RunFolder, path: Path, digest: str | None = None, ranks: Ranks = ALONE, shard: Shard | None = None
) -> tuple[Path, dict[str, Any], str | None]:
    """The checkpoint `path` of a run, or the newest whole one where that is lost or damaged: its path, its content, and a message then.

    All `ranks` have to call it. Raises RunError if none is whole.

    Args:
        digest: of the run's plan; no checkpoint of another plan is taken in place of `path`.
    """
    try:
        return path, _loaded(path, ranks, shard), None
    except RunError as error:
        for name in ranks.broadcast(_newest_first(folder, digest) if ranks.first else None):
            with suppress(RunError):
                state = _loaded(folder.path / name, ranks, shard)
                progress = Progress(**state["progress"])
                used = f"{name} (epoch {progress.epoch}, step {progress.step}) is used in its place"
                return folder.path / name, state, f"{error.where}: {error.what}; {used}"
        raise _advised(error, ()) from error


def _newest_first(folder: RunFolder, digest: str | None) -> list[str]:
    """The names of a run's legible checkpoints, those with the most steps first."""
    found: list[tuple[int, str]] = []
    for path in folder.checkpoints():
        with suppress(RunError):
            content = _content(path)
            if digest in (None, content["digest"]):
                found.append((-content["progress"]["total"], path.name))
    return [name for _, name in sorted(found, key=lambda item: item[0])]


def _advised(error: RunError, others: Sequence[str]) -> RunError:
    """An error about a checkpoint, with what to do unless it says so itself; `others` of the run are whole."""
    if error.fix:
        return error
    fix = f"Use {' or '.join(others)} in its place" if others else "There is no other checkpoint that is whole: start the run again"
    return RunError(error.what, where=error.where, fix=fix)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _is_whole(path: Path) -> bool:
    with suppress(RunError):
        return bool(_loaded(path))
    return False


def _loaded(path: Path, ranks: Ranks = ALONE, shard: Shard | None = None) -> dict[str, Any]:
    """A checkpoint with the tensors in its parts. All `ranks` have to call it; raises RunError on all."""
    state: dict[str, Any] = ranks.broadcast(ranks.together(lambda: _content(path) if ranks.first else {}))
    if (parts := state.pop("parts")) is not None:
        read_parts(state, path.parent, parts, ranks, shard)
    return state


def _content(path: Path) -> dict[str, Any]:
    """The file of a checkpoint, without the tensors in its parts."""
    where = str(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RunError("is a pipe or a device, not a checkpoint", where=where)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError("there is no checkpoint here", where=where) from error
    except Exception as error:  # unpickling a damaged file may raise anything, with advice to load it unsafely
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a place before the start of a file that was cut
            raise RunError(f"cannot be read: {reason(error)}", where=where) from error
        raise RunError("is damaged or not a checkpoint", where=where) from error
    if not isinstance(state, dict) or "graphopt" not in state:
        raise RunError("is not a checkpoint of graphopt", where=where)
    check_version(state["graphopt"], FORMAT_VERSION, where)
    if state.pop("checksum", None) != content_digest(state):
        raise RunError("is damaged: its content is not what was written", where=where)
    return {"parts": None, **state}
