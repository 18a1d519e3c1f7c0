"""The folder of a run: who owns it, and which checkpoints stay in it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from graphopt.errors import RunError
from graphopt.files import link_atomically, lock_folder, reason, write_atomically
from graphopt.plan_file import check_digest

MANIFEST = "run.json"
FORMAT_VERSION = 1


class RunFolder:
    """The folder of one run: `run.json` (its manifest), `spec.toml`, `last.pt`, `best.pt`, `metrics.jsonl`, `summary.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self._lock: int | None = None

    @classmethod
    def claim(cls, path: str | os.PathLike[str], digest: str, spec: str, *, resume: bool) -> Self:
        """Takes `path` for a run: it must be new, empty, or (with `resume`) a run of the same spec.

        Raises:
            RunError: it is something else, another spec's run, or in use by another process.
        """
        folder = cls(Path(path))
        where = str(folder.path)
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
                raise RunError(
                    "the output folder holds a run already", where=where, fix="Continue it with --resume, or choose a new folder"
                )
            fix = "Resume with the spec.toml inside the folder, or choose a new folder"
            check_digest(manifest["digest"], digest, where, fix)
        try:
            folder._lock = lock_folder(folder.path)
        except BlockingIOError as error:
            raise RunError("another process is training in this folder", where=where) from error
        if manifest is None:
            write_atomically(folder.path / MANIFEST, json.dumps({"graphopt": FORMAT_VERSION, "digest": digest}) + "\n")
        write_atomically(folder.path / "spec.toml", spec)
        return folder

    def release(self) -> None:
        """Lets another process have the folder."""
        descriptor, self._lock = self._lock, None
        if descriptor is not None:
            os.close(descriptor)

    def save(self, state: Mapping[str, Any], *, best: bool = False, keep: int = 2, epoch: int | None = None) -> None:
        """Replaces `last.pt` by `state`, atomically.

        Args:
            best: `best.pt` too (unless only one stays).
            keep: how many checkpoints stay: the last, the best, and from 3 on the latest epochs' (`epoch-0007.pt`).
            epoch: finished epochs, where this is the end of one.
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
