"""A run on disk: one folder, whose checkpoints are whole or not there at all.

A checkpoint is a state dict, the spec, its digest and the decisions so far, and whatever else the next step depends on. No module
is ever pickled: structure comes from replaying (spec, decisions), and every file loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.errors import RunError
from graphopt.files import _reason, _sync_folder, write_atomically

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
MARK = "run.json"


def random_states() -> dict[str, Any]:
    """Every generator a step may draw from, as plain values and tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states()`; CUDA generators only where the machine has as many."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class RunFolder:
    """The folder of one run: `run.json` (whose it is), `spec.toml`, `last.pt`, `best.pt`, `metrics.jsonl`, `summary.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self._lock: int | None = None

    @classmethod
    def claim(cls, path: str | os.PathLike[str], digest: str, spec: str, *, resume: bool) -> RunFolder:
        """Take `path` for a run: it must be new, empty, or (with `resume`) a run of the same spec.

        Raises RunError when it is something else, another spec's run, or in use by another process.
        """
        folder = cls(Path(path))
        where = str(folder.path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            entries = [entry.name for entry in folder.path.iterdir() if not entry.name.startswith(f".{MARK}.")]
        except OSError as error:
            raise RunError(f"cannot be an output folder: {_reason(error)}", where=where) from error
        mark = read_mark(folder.path) if entries else None
        if entries and mark is None:
            raise RunError("the output folder holds files that are not a run of graphopt", where=where, fix="Choose a new folder.")
        if mark is not None:
            if not resume:
                raise RunError("a run is here already", where=where, fix="Continue it with --resume, or choose a new folder.")
            check_digest(mark["digest"], digest, where)
        folder._take_lock()
        if mark is None:
            text = json.dumps({"graphopt": FORMAT, "digest": digest}) + "\n"
            write_atomically(folder.path / MARK, text.encode())
        write_atomically(folder.path / "spec.toml", spec.encode())
        return folder

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        # The folder itself carries the lock, so that no file is left for it; the kernel frees it however the run ends.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RunError("another process is training in this folder", where=str(self.path)) from error
        except OSError:
            os.close(descriptor)  # a file system without locks
            return
        self._lock = descriptor

    def release(self) -> None:
        """Let another process have the folder."""
        descriptor, self._lock = self._lock, None
        if descriptor is not None:
            os.close(descriptor)

    def save(self, state: Mapping[str, Any], *, best: bool = False, keep: int = 2, epoch: int | None = None) -> None:
        """Replace `last.pt` by `state`, atomically.

        Args:
            best: `best.pt` too (unless only one is kept).
            keep: how many checkpoints stay: the last, the best, and from 3 on the latest epochs' (`epoch-0007.pt`).
            epoch: finished epochs, where this is the end of one.
        """
        write_atomically(self.last, lambda file: torch.save(dict(state), file))
        if best and keep > 1:
            _link_atomically(self.last, self.best)
        if epoch is not None and keep > 2:
            _link_atomically(self.last, self.path / f"epoch-{epoch:04d}.pt")
            for old in sorted(self.path.glob("epoch-*.pt"))[: 2 - keep]:
                old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU, or None where a run stopped before its first."""
        return load_checkpoint(self.last) if self.last.exists() else None


def _link_atomically(source: Path, target: Path) -> None:
    """`target` becomes a second name of `source`'s content; replacing `source` later does not touch it."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        try:
            shutil.copyfile(source, temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"could not be written: {_reason(error)}", where=str(target), fix="Make room.") from error
    os.replace(temporary, target)
    _sync_folder(target.parent)


def read_mark(path: Path) -> dict[str, Any] | None:
    """What `run.json` says, or None where the folder is not a run."""
    try:
        mark = json.loads((path / MARK).read_text())
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and "graphopt" in mark and "digest" in mark else None


def check_digest(found: str, expected: str, where: str) -> None:
    """Raise RunError unless a checkpoint's digest is the spec's (R2)."""
    if found != expected:
        raise RunError(
            f"this is a run of another spec (digest {found[:12]}, yours is {expected[:12]})",
            where=where,
            fix="Resume with the spec.toml inside the folder, or choose a new folder.",
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`, onto the CPU. Raises RunError when it is missing, damaged or not ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError("there is no checkpoint here", where=str(path)) from error
    except Exception as error:  # unpickling a damaged file may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"is damaged or not a checkpoint: {reason}",
            where=str(path),
            fix="Where best.pt is whole, export it; otherwise start the run anew.",
        ) from error
    if not isinstance(state, dict) or state.get("graphopt") != FORMAT:
        raise RunError("is not a checkpoint that this version of graphopt reads", where=str(path))
    return state
