"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from graphopt.errors import RunError


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file that appears under `path` whole, on disk, or not at all; what was there before stays until then.

    Raises RunError when the disk is full or refuses; no temporary file is left behind.
    """
    handle = None
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        handle = os.fdopen(descriptor, "wb")
        if isinstance(content, bytes):
            handle.write(content)
        else:
            content(handle)
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if handle is not None:
            with suppress(OSError):  # closing flushes, and fails again where writing did
                handle.close()
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        # torch's archive writer reports a failed write of ours as a RuntimeError of its own.
        if isinstance(error, (OSError, RuntimeError)):
            raise RunError(
                f"could not be written: {_reason(error)}",
                where=str(path),
                fix="Make room or choose another folder; what was there before is untouched.",
            ) from error
        raise


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
