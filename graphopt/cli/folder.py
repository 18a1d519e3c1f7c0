"""Writes the folder of `apply`: all of it or nothing, and never over files that `apply` did not write."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from graphopt.errors import RunError

#: the files that `apply` writes; a folder that holds anything else is left alone
OURS = frozenset({"spec.toml", "report.json", "graph.txt", "diff.html", "diff.svg"})


def check_folder(path: Path) -> None:
    """Before any work: `path` is new, empty, or was written by `apply`.

    Raises:
        RunError: it is a file, a folder with other content, or cannot be read.
    """
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise RunError("is a file, not a folder", where=str(path), fix="Choose another folder")
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise RunError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not names:
        return
    if names - OURS or not _is_report(path / "report.json"):
        other = sorted(names - OURS) or sorted(names)
        raise RunError(
            f"exists and was not written by apply (it holds {other[0]!r})", where=str(path), fix="Choose a new or an empty folder"
        )


def write_folder(path: Path, files: Mapping[str, str]) -> None:
    """Writes `files` (name -> text) as the folder `path`: all of them, or none.

    A new folder appears by one rename. In a folder that `apply` has written before, each file is replaced at once, and files that
    are no longer written are removed.

    Raises:
        RunError: the folder cannot be written, or the disk is full; no partial file is left.
    """
    check_folder(path)
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        for name, text in files.items():
            with open(staging / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        os.chmod(staging, 0o755)
        if path.exists() and any(path.iterdir()):
            for name in files:
                os.replace(staging / name, path / name)
            for stale in OURS - files.keys():
                (path / stale).unlink(missing_ok=True)
        else:
            os.replace(staging, path)
    except OSError as error:
        what = f"could not be written: {(error.strerror or str(error)).lower()}"
        raise RunError(what, where=str(path), fix="Make room, or choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _is_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"digest", "passes"} <= report.keys()
