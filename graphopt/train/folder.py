"""The folder of a run: which files it has, who may write there, and what is left when a run ends before its first step."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from graphopt.errors import RunError
from graphopt.files import (
    link_atomically,
    lock_folder,
    read_text,
    reason,
    remove_if_empty,
    sealed,
    unlock_folder,
    unsealed,
    write_atomically,
)
from graphopt.hashing import content_digest, hash_parts
from graphopt.plan_file import check_digest
from graphopt.train.feature_cache.store import remove_features
from graphopt.train.parts import remove_unused

MANIFEST = "run.json"
MANIFEST_VERSION = 2


class RunFolder:
    """The folder of one run: `run.json` (its manifest), `spec.toml`, checkpoints, `metrics.jsonl`, `summary.json`.

    The checkpoints are `last.pt`, the one before it (`previous.pt`), the best (`best.pt`) and those of the latest epochs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.previous, self.best = (path / f"{name}.pt" for name in ("last", "previous", "best"))
        self.metrics, self.summary, self.features = path / "metrics.jsonl", path / "summary.json", path / "features"
        self.ledger = path / "ledger.bin"
        self.manifest: dict[str, Any] | None = None
        self._made: list[Path] = []  # folders that did not exist before, the innermost first
        self._lock: int | None = None
        self._begun = False

    @classmethod
    def claim(cls, path: str | os.PathLike[str], digest: str, *, resume: bool) -> Self:
        """Takes `path` for a run, without a change to anything in it; `begin` makes it the run's, `release` gives it back.

        Raises RunError unless it is new, empty, a run without a checkpoint, or (with `resume`) the same spec's run, and used by no other.
        """
        folder, where = cls(Path(path)), os.fspath(path)
        try:
            folder._made = [p for p in (folder.path, *folder.path.parents) if not p.exists()]
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._lock = lock_folder(folder.path)
            folder._check(digest, resume)
        except BlockingIOError as error:
            raise RunError("another process is training in this folder", where=where) from error
        except OSError as error:
            raise RunError(f"cannot be an output folder: {reason(error)}", where=where) from error
        except RunError:
            folder.release()
            raise
        return folder

    def _check(self, digest: str, resume: bool) -> None:
        where, fix = str(self.path), "Continue it with --resume, or choose a new folder"
        check_entries(self.path, links=False)
        names = [entry.name for entry in self.path.iterdir() if not _LEFTOVER.fullmatch(entry.name)]
        self.manifest = read_manifest(self.path) if names else None
        saved = bool(self.checkpoints())
        if self.manifest is None and MANIFEST in names and not saved:
            raise RunError("is damaged, and there is no checkpoint", where=str(self.path / MANIFEST), fix="Choose a new folder")
        if self.manifest is None and names and not (saved and (resume or MANIFEST in names)):
            raise RunError("the output folder holds files that are not a run of graphopt", where=where, fix="Choose a new folder")
        if saved and not resume:
            raise RunError("the output folder holds a run already", where=where, fix=fix)
        # Without a legible manifest, the checkpoint itself says whose run it is.
        if saved and self.manifest is not None:
            check_digest(self.manifest["digest"], digest, where, "Resume with the spec.toml inside the folder, or choose a new folder")

    def begin(self, digest: str, spec: str) -> None:
        """Makes the folder the run's: removes what killed processes have left, and writes the manifest and the spec."""
        self._begun = True
        for entry in self.path.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
        remove_unused(self.path, self.checkpoints())
        if self.manifest is None or self.manifest["digest"] != digest:
            remove_features(self.features)  # of an attempt with another spec
        manifest = {"graphopt": MANIFEST_VERSION, "digest": digest, "spec": hash_parts(spec.encode())}
        if manifest != self.manifest:  # before anything else: by this file a folder is a run
            write_atomically(self.path / MANIFEST, sealed(manifest) + "\n")
        write_atomically(self.path / "spec.toml", spec)

    def abandon(self) -> None:
        """Removes what `begin` and a run without a step have written; nothing where there is a checkpoint."""
        if self._begun and not self.checkpoints():
            for path in (
                self.metrics,
                self.ledger,
                self.path / "spec.toml",
                self.path / MANIFEST,
                *self.path.glob("tensorboard/events.out.tfevents.*"),
            ):
                path.unlink(missing_ok=True)
            remove_if_empty(self.path / "tensorboard")
            remove_unused(self.path, [])
            remove_features(self.features)

    def release(self) -> None:
        """Lets another process have the folder; one that `claim` has made goes if nothing is in it."""
        for made in self._made:
            remove_if_empty(made)
        unlock_folder(self._lock)
        self._lock = None

    def epoch_path(self, epoch: int) -> Path:
        """The checkpoint at the end of an epoch."""
        return self.path / f"epoch-{epoch:04d}.pt"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that there are, the last one first."""
        known = (self.last, self.previous, self.best, *sorted(self.path.glob("epoch-*.pt"), reverse=True))
        return [path for path in known if path.is_file()]

    def has(self, path: Path) -> bool:
        """Whether a file has the name and the place of a checkpoint of this run."""
        return path.parent == self.path and _CHECKPOINT.fullmatch(path.name) is not None

    def save(self, state: Mapping[str, Any], *, best: bool = False, keep: int = 2, epoch: int | None = None) -> None:
        """Replaces `last.pt` by `state`, atomically, and with `best` also `best.pt`; `epoch` is the one that ends here, if one does.

        Of `keep` checkpoints, the first is the last, the second the best, and the others are the latest epochs' (`epoch-0007.pt`).
        From 2 on the one before the last stays, too: if the last is damaged, no more than one interval is lost.
        """
        content = {**state, "checksum": content_digest(state)}

        def links(new: Path) -> None:
            # They come before `last.pt`: a run that is killed in between takes the same steps again, and writes the same files.
            if best and keep > 1:
                link_atomically(new, self.best)
            if epoch is not None and keep > 2:
                link_atomically(new, self.epoch_path(epoch))
                for old in sorted(self.path.glob("epoch-*.pt"))[: 2 - keep]:
                    old.unlink(missing_ok=True)
            if keep > 1 and self.last.exists():
                link_atomically(self.last, self.previous)

        write_atomically(self.last, lambda file: torch.save(content, file), links=links)
        remove_unused(self.path, self.checkpoints())


#: temporary files of a process that was killed while it wrote
_LEFTOVER = re.compile(r"\.(run\.json|spec\.toml|summary\.json|(last|previous|best|epoch-\d+)\.pt)\.(link|[a-z0-9_]{8})")


_CHECKPOINT = re.compile(r"(last|previous|best|epoch-\d+)\.pt")

#: the names under which a run has files, and those under which it has folders
_FILE = re.compile(r"(run|summary)\.json|spec\.toml|metrics\.jsonl|ledger\.bin|(last|previous|best|epoch-\d+)\.pt")
_FOLDERS = {"features", "parts", "tensorboard"}


def check_entries(path: Path, *, links: bool) -> None:
    """Raises RunError if something in the folder of a run is not what a run has under that name; with `links`, links to files may be there.

    Through a link, a run would write to a file elsewhere.
    """
    for entry in sorted(path.iterdir()):
        folder = entry.name in _FOLDERS
        if not folder and not _FILE.fullmatch(entry.name):
            continue
        if entry.is_dir() if folder else entry.is_file() and (links or not entry.is_symlink()):
            continue
        kinds = {"a link": entry.is_symlink(), "a folder": entry.is_dir(), "a file": entry.is_file(), "a pipe or a device": True}
        what = f"is {next(kind for kind, given in kinds.items() if given)}, where a run has a {'folder' if folder else 'file'}"
        raise RunError(what, where=str(entry), fix="Move it away; nothing in the folder was changed")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The content of a folder's `run.json`, or None where the folder is not a run or the file is damaged."""
    try:
        manifest = unsealed(read_text(path / MANIFEST))
    except (OSError, ValueError):
        return None
    return manifest if "graphopt" in manifest and "digest" in manifest else None
