"""Storage of cached features: rows of one dtype in RAM or in a file, with checksums.

On disk an entry is three files named by its key: `<key>.rows` (the features, row by row), `<key>.targets` (int64) and `<key>.json`, which
is written last and makes the entry exist. Until then the rows are in `<key>.part`, and `<key>.progress` says how many of them are surely
on disk; an interrupted fill continues from there. Any number of processes may read an entry; one at a time fills it.
"""

import os
import re
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from graphopt.errors import RunError
from graphopt.files import BINARY, exclusive, read_at, read_text, reason, remove_if_empty, sealed, unsealed, write_at, write_atomically
from graphopt.hashing import raw_bytes

FORMAT_VERSION = 2
MANIFEST = "features.json"
#: bytes between two records of a fill's progress: the most that an interruption loses
STRIDE = 256 << 20


@dataclass(frozen=True)
class EntryLayout:
    """What an entry holds: `rows` features of one shape and dtype.

    Of several ranks each has an entry of its own, `part` (its number, their number) of the features that `whole` identifies.
    """

    key: str  # identifies the prefix and its inputs
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: int  # rows per checksum, and per write
    whole: str = ""
    part: tuple[int, int] = (0, 1)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """The inverse of `table`. Raises KeyError or TypeError for what is not one."""
        values = {field.name: table[field.name] for field in fields(cls)}
        values |= {"shape": tuple(table["shape"]), "part": tuple(table["part"])}
        return cls(**{**values, "dtype": getattr(torch, table["dtype"].removeprefix("torch."))})

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk)

    def span(self, number: int) -> tuple[int, int]:
        """First row of a chunk, and the first after it."""
        return number * self.chunk, min((number + 1) * self.chunk, self.rows)

    def table(self) -> dict[str, Any]:
        plain = {"shape": list(self.shape), "dtype": str(self.dtype), "part": list(self.part)}
        return {"graphopt": FORMAT_VERSION, **asdict(self), **plain}

    def describes(self, table: dict[str, Any]) -> bool:
        return self.table().items() <= table.items()


@dataclass(frozen=True)
class CacheEntry:
    """A complete entry: `features` (rows, *shape) and `targets` (rows,) int64. Nobody but the cache writes to rows."""

    layout: EntryLayout
    features: "Tensor | RowFile"
    targets: Tensor


class RowFile:
    """The rows of a file, read like those of a tensor. Nothing is mapped into memory: of a file that is cut short, that would be SIGBUS.

    Raises RunError if somebody has changed the file since it was opened; removing it changes nothing.
    """

    def __init__(self, path: Path, layout: EntryLayout) -> None:
        self._path, self._layout = path, layout
        self._handle = os.open(path, os.O_RDONLY | BINARY)
        weakref.finalize(self, os.close, self._handle)
        self._opened = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._handle)
        return status.st_size, status.st_mtime_ns

    def index_select(self, _: int, rows: Tensor) -> Tensor:
        """The rows with these numbers."""
        return self._read(rows.tolist(), 1)

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self._layout.rows)
        return self._read([first], end - first)

    def _read(self, starts: list[int], rows: int) -> Tensor:
        found = torch.empty(len(starts) * rows, *self._layout.shape, dtype=self._layout.dtype)
        view, size, complete = raw_bytes(found), rows * self._layout.row_bytes, True
        for number, start in enumerate(starts):
            part, offset = view[number * size : (number + 1) * size], start * self._layout.row_bytes
            while part and (count := read_at(self._handle, part, offset)):
                part, offset = part[count:], offset + count
            complete &= not part
        if not complete or self._stamp() != self._opened:
            fix = "Continue with --resume: the features are computed again"
            raise RunError("the file of features was changed while a run reads it", where=str(self._path), fix=fix)
        return found


class CacheDirectory:
    """A folder of entries. It belongs to the runs of one spec, which its `features.json` names."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = [entry.name for entry in path.iterdir()]
        except OSError as error:
            raise RunError(f"cannot hold features: {reason(error)}", where=str(path)) from error
        made = [name for name in names if name.startswith(f".{MANIFEST}.")]
        if MANIFEST not in names and len(made) < len(names):
            raise RunError("the folder holds files that are no features of graphopt", where=str(path), fix="Name a new folder")
        if MANIFEST not in names or made:  # new, or a process was killed while it made it
            self._begin(digest)
        owner = str(_read(path / MANIFEST).get("digest", ""))
        if not owner:
            raise RunError("is damaged", where=str(path / MANIFEST), fix="Remove the folder: the features are computed again")
        if owner != digest:
            what = f"these are features of another run (digest {owner[:12]}, yours is {digest[:12]})"
            raise RunError(what, where=str(path), fix="Name another folder, or remove this one")

    def _begin(self, digest: str) -> None:
        """Makes the folder this spec's if it is nobody's, and removes what a process that was killed at that has left."""
        lock = self.path / f".{MANIFEST}.lock"
        with exclusive(lock):
            for left in self.path.glob(f".{MANIFEST}.*"):
                if left != lock:
                    left.unlink(missing_ok=True)
            if not (self.path / MANIFEST).exists():
                write_atomically(self.path / MANIFEST, sealed({"graphopt": FORMAT_VERSION, "digest": digest}))

    def file(self, layout: EntryLayout, kind: str) -> Path:
        return self.path / f"{layout.key}.{kind}"

    def open(self, layout: EntryLayout) -> CacheEntry | None:
        """The entry, if it is complete and every checksum holds; a damaged one is removed."""
        header = _read(self.file(layout, "json"))
        if not header and self.file(layout, "json").exists():
            self.remove(layout)
        if not header:
            return None
        rows, targets = self.file(layout, "rows"), self.file(layout, "targets")
        sizes = [file.stat().st_size for file in (rows, targets) if file.is_file()]
        if layout.describes(header) and sizes == [layout.bytes, layout.rows * 8]:
            entry = CacheEntry(layout, RowFile(rows, layout), torch.frombuffer(bytearray(targets.read_bytes()), dtype=torch.int64))
            sums = [zlib.crc32(raw_bytes(entry.features[a:b])) for a, b in map(layout.span, range(layout.chunks))]
            if sums == header.get("sums") and zlib.crc32(raw_bytes(entry.targets)) == header.get("targets"):
                return entry
        self.remove(layout)
        return None

    def parts(self, layout: EntryLayout) -> list[CacheEntry]:
        """The same features as another number of ranks has them, in the order of these ranks; empty where one is missing or damaged."""
        known: dict[int, dict[int, EntryLayout]] = {}
        for path in self.path.glob("*.json"):
            table = _read(path)
            if table.get("whole") == layout.whole and table.get("part") != list(layout.part):
                found = EntryLayout.from_table(table)
                known.setdefault(found.part[1], {})[found.part[0]] = found
        for count, layouts in sorted(known.items()):
            if count != layout.part[1] and len(layouts) == count:
                entries = [entry for number in range(count) if (entry := self.open(layouts[number])) is not None]
                if len(entries) == count:
                    return entries
        return []

    def remove(self, layout: EntryLayout) -> None:
        """Removes an entry, first the file that makes it exist."""
        for kind in ("json", "rows", "targets", "part", "progress"):
            self.file(layout, kind).unlink(missing_ok=True)

    @contextmanager
    def filling(self, layout: EntryLayout) -> Iterator["FileFill | CacheEntry"]:
        """An entry to fill, or the one that another process has filled while this one waited. Raises OSError if the disk has no room."""
        with exclusive(self.file(layout, "lock")):
            for left in self.path.glob(f".{layout.key}.*"):  # by a process that was killed
                left.unlink(missing_ok=True)
            entry = self.open(layout)
            if entry is not None:
                for kind in ("part", "progress"):
                    self.file(layout, kind).unlink(missing_ok=True)
                yield entry
                return
            fill = FileFill(self, layout)
            try:
                yield fill
            finally:
                os.close(fill.handle)


class Fill(ABC):
    """An entry while it is filled, chunk by chunk; `done` of them an interrupted fill has left."""

    def __init__(self, layout: EntryLayout) -> None:
        self.layout, self.done = layout, 0
        self.targets = torch.zeros(layout.rows, dtype=torch.int64)

    @property
    def missing(self) -> Iterator[tuple[int, int]]:
        """The spans of rows that are still to be written, one a chunk."""
        return map(self.layout.span, range(self.done, self.layout.chunks))

    def write(self, number: int, features: Tensor, targets: Tensor) -> None:
        """Writes chunk `number`, in order: features in the layout's dtype, on the CPU. Raises OSError if there is no room."""
        first, end = self.layout.span(number)
        self.targets[first:end] = targets
        self._put(first, features)

    def read(self, rows: Tensor) -> Tensor:
        """Rows that have been written, by number; to measure how fast that is."""
        return self._written().index_select(0, rows)

    @abstractmethod
    def finish(self) -> CacheEntry: ...

    @abstractmethod
    def _put(self, first: int, features: Tensor) -> None: ...

    @abstractmethod
    def _written(self) -> Tensor | RowFile: ...

    def flush(self) -> None:  # noqa: B027 (in RAM there is nothing to do)
        """Saves what has been written, so that an interruption loses nothing of it."""

    def discard(self) -> None:  # noqa: B027 (in RAM there is nothing to do)
        """Removes everything that has been written."""


class FileFill(Fill):
    """An entry on disk while it is filled."""

    def __init__(self, directory: CacheDirectory, layout: EntryLayout) -> None:
        super().__init__(layout)
        self.directory = directory
        self._part = directory.file(layout, "part")
        self.sums: list[int] = []
        progress = _read(directory.file(layout, "progress"))
        if layout.describes(progress) and self._part.exists():
            self._resume(progress)
        self.done = len(self.sums)
        self.handle = os.open(self._part, os.O_CREAT | os.O_RDWR | BINARY, 0o644)
        self._unrecorded = 0
        try:
            # All of the room at once: a full disk shows before the first forward pass.
            reserve(self.handle, layout.bytes)
        except OSError:
            os.close(self.handle)
            self.discard()
            raise

    def _resume(self, progress: dict[str, Any]) -> None:
        with self._part.open("rb") as file:
            for number, expected in enumerate(progress.get("sums", [])):
                first, end = self.layout.span(number)
                if zlib.crc32(file.read((end - first) * self.layout.row_bytes)) != expected:
                    break
                self.sums.append(expected)
        known = self.layout.span(len(self.sums))[0]
        self.targets[:known] = torch.tensor(progress.get("targets", [])[:known], dtype=torch.int64)

    def _put(self, first: int, features: Tensor) -> None:
        data = raw_bytes(features)
        _write(self.handle, data, first * self.layout.row_bytes)
        self.sums.append(zlib.crc32(data))
        self._unrecorded += len(data)
        if self._unrecorded >= STRIDE:
            self.flush()

    def _written(self) -> RowFile:
        return RowFile(self._part, self.layout)

    def flush(self) -> None:
        os.fsync(self.handle)
        self._write_table("progress", targets=self.targets[: self.layout.span(len(self.sums))[0]].tolist())
        self._unrecorded = 0

    def finish(self) -> CacheEntry:
        os.fsync(self.handle)
        file = self.directory.file
        rows = file(self.layout, "rows")
        write_atomically(file(self.layout, "targets"), bytes(raw_bytes(self.targets)))
        self._part.replace(rows)
        self._write_table("json", targets=zlib.crc32(raw_bytes(self.targets)))
        file(self.layout, "progress").unlink(missing_ok=True)
        return CacheEntry(self.layout, RowFile(rows, self.layout), self.targets)

    def _write_table(self, kind: str, **more: Any) -> None:
        write_atomically(self.directory.file(self.layout, kind), sealed({**self.layout.table(), "sums": self.sums, **more}))

    def discard(self) -> None:
        self.directory.remove(self.layout)


class MemoryFill(Fill):
    """An entry in RAM while it is filled. Raises OSError if there is not enough memory."""

    def __init__(self, layout: EntryLayout) -> None:
        if layout.bytes > available_memory():
            raise OSError(0, "not enough memory")
        super().__init__(layout)
        self.features = torch.empty(layout.rows, *layout.shape, dtype=layout.dtype)

    def _put(self, first: int, features: Tensor) -> None:
        self.features[first : first + len(features)] = features

    def _written(self) -> Tensor:
        return self.features

    def finish(self) -> CacheEntry:
        return CacheEntry(self.layout, self.features, self.targets)


def remove_features(path: Path) -> None:
    """Removes the entries and the manifest of a folder, and the folder if nothing else is in it; files of others stay."""
    with suppress(OSError):  # tidying up is no reason to fail
        if (path / MANIFEST).is_file():
            for entry in path.iterdir():
                if _OWN.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
            remove_if_empty(path)


#: the files of entries, the manifest, and what a process that was killed has left of them
_OWN = re.compile(r"\.?([0-9a-f]{32}\.(rows|targets|json|part|progress|lock)|features\.json)(\.[a-z0-9_]{8})?")


def reserve(handle: int, size: int) -> None:
    """Gives an open file `size` bytes of disk. Raises OSError if there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = write_at(handle, data, offset)
        data, offset = data[written:], offset + written


def available_memory() -> float:
    """Bytes that can be allocated without swapping, less a tenth; infinite where the system does not say."""
    try:
        figures = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 0.9 * int(figures["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or it is damaged."""
    try:
        return unsealed(read_text(path))
    except (OSError, ValueError):
        return {}
