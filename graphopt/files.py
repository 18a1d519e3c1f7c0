"""Files and folders that appear whole or not at all, and locks on them."""

import errno
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from graphopt.errors import RunError, first_line

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]  # the module's type has no None

_ROOM = "Make room or choose another folder; what was there before is untouched"


def write_atomically(
    path: Path, content: str | bytes | Callable[[IO[bytes]], None], *, links: Callable[[Path], None] | None = None
) -> None:
    """Writes a file that appears under `path` whole, on disk, or not at all; what was there before stays until then.

    A function as `content` writes to the open file. Raises RunError if the disk is full or refuses; no temporary file is left.
    `links` is called with the whole file under its temporary name, for other names that it must have before it has this one.
    """
    if isinstance(content, str):
        content = content.encode()
    if path.exists() and not (path.is_file() or path.is_dir()):  # a file would take its place
        raise RunError("is a pipe or a device, not a file", where=str(path), fix="Name a file")
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if links is not None:
            links(Path(temporary))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        # torch's archive writer reports a failed write of ours as a RuntimeError of its own.
        if isinstance(error, (OSError, RuntimeError)):
            raise RunError(f"could not be written: {reason(error)}", where=str(path), fix=_ROOM) from error
        raise


def link_atomically(source: Path, target: Path) -> None:
    """Makes `target` a second name of the content of `source`, which stays when `source` is replaced; a copy where links are impossible."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # renaming does nothing where both are the same file already
        sync_folder(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"could not be written: {reason(error)}", where=str(target), fix=_ROOM) from error


def write_folder(path: Path, files: Mapping[str, str], allowed: Collection[str]) -> None:
    """Writes `files` (name -> text) as the folder `path`: all of them, or none (RunError: the disk is full or refuses).

    A new folder appears by one rename. In one that exists each file is replaced whole, and others of `allowed` are removed.
    """
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        for name, text in files.items():
            write_atomically(staging / name, text)
        staging.chmod(0o755)
        if path.exists() and any(path.iterdir()):
            for name in files:
                os.replace(staging / name, path / name)
            for stale in set(allowed) - files.keys():
                (path / stale).unlink(missing_ok=True)
        else:
            os.replace(staging, path)
    except (OSError, RunError) as error:
        raise RunError(f"could not be written: {reason(error)}", where=str(path), fix="Make room, or choose another folder") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def lock_folder(path: Path) -> int | None:
    """Takes a folder for this process; raises BlockingIOError if another process has it.

    The folder itself carries the lock, and the system frees it however the process ends. Returns a descriptor that holds the lock until
    it is closed; None where there are no locks (Windows, some network file systems).
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    _locks.add(descriptor)
    return descriptor


def unlock_folder(descriptor: int | None) -> None:
    """Gives back what `lock_folder` has returned."""
    if descriptor is not None:
        _locks.discard(descriptor)
        os.close(descriptor)


#: descriptors that hold locks of folders; a forked process, which may outlive this one, does not hold them too
_locks: set[int] = set()


def _drop_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while open; waits until no other process holds it."""
    descriptor = _locked(path)
    try:
        yield
    finally:
        # While it is locked: who waits for it sees that it is gone, and nobody else locks another file of that name meanwhile.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | BINARY, 0o644)
        if fcntl is None:
            return descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # whoever held it has removed it


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, also for a pipe or a device, where reading may never end; ValueError if it is no UTF-8."""
    if path.is_fifo() or path.is_char_device():
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8")


#: last key of a JSON object that `sealed` has written
_SEAL = "crc32"


def sealed(record: Mapping[str, Any], *, indent: int | None = None) -> str:
    """A JSON object with a checksum of the others as its last key."""
    return json.dumps({**record, _SEAL: zlib.crc32(json.dumps(record).encode())}, indent=indent)


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, or is nested deeper than Python goes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given. Raises ValueError for what is no JSON object, and for one that is not what was written."""
    record = read_json(text)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    if record.pop(_SEAL, None) != zlib.crc32(json.dumps(record).encode()):
        raise ValueError("its content is not what was written")
    return record


def reason(error: BaseException) -> str:
    """Why a file operation failed, in the system's words: `"no space left on device"`."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def cache_folder(name: str) -> Path:
    """Where the platform wants what can be made anew; it may not exist. Raises RuntimeError for a user without a home folder."""
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}.get(sys.platform, "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "graphopt" / name


def remove_if_empty(folder: Path) -> None:
    """Removes a folder, unless there is something in it, it is a link, or the system refuses."""
    with suppress(OSError):
        folder.rmdir()


def sync_file(path: Path) -> None:
    """Brings a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


#: for `os.open`: bytes stay as they are where text files would have other ends of lines (Windows)
BINARY = getattr(os, "O_BINARY", 0)


def read_at(handle: int, buffer: memoryview, offset: int) -> int:
    """Reads into `buffer` from a place in an open file; the number of bytes read, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [buffer], offset)
    os.lseek(handle, offset, os.SEEK_SET)  # Windows, where a file has one reader here
    data = os.read(handle, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(handle: int, data: memoryview, offset: int) -> int:
    """Writes at a place in an open file; the number of bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.write(handle, data)


def sync_folder(folder: Path) -> None:
    """Brings a folder's entries to the disk, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
