"""Features at rest: rows of one dtype in RAM or in a memory-mapped file, with the checksums that say whether they are what was written.

On disk an entry is three files named by its key: `<key>.rows` (the features, row by row), `<key>.targets` (int64) and `<key>.json`, which
is written last and makes the entry exist. Until then the rows lie in `<key>.part`, with a `<key>.progress` that says how many are on
disk for sure; a fill that was interrupted goes on from there. Any number of processes may read an entry; one at a time fills it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import RunError
from graphopt.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows: two processes may fill one entry twice there
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
MARK = "features.json"
#: bytes between two records of a fill's progress: what an interruption costs at most
STRIDE = 256 << 20


@dataclass(frozen=True)
class Layout:
    """What an entry holds. `rows` of `shape` in `dtype`, checked in chunks of `chunk` rows; `key` says of which prefix and data."""

    key: str
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: int

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
        plain = {"key": self.key, "rows": self.rows, "shape": list(self.shape), "dtype": str(self.dtype), "chunk": self.chunk}
        return {"graphopt": FORMAT, **plain}


@dataclass(frozen=True)
class Store:
    """A whole entry: `features` (rows, *shape) and `targets` (rows,) int64. Rows are not to be written to."""

    layout: Layout
    features: Tensor
    targets: Tensor


def bits(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, whatever its dtype."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Folder:
    """A folder of entries. It belongs to one spec's runs, and says so in `features.json`."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            entries = [e.name for e in path.iterdir()]
        except OSError as error:
            raise RunError(f"cannot hold features: {(error.strerror or str(error)).lower()}", where=str(path)) from error
        mark = path / MARK
        if MARK in entries:
            owner = _read(mark).get("digest")
            if owner != digest:
                raise RunError(
                    f"these are features of another run (digest {str(owner)[:12]}, yours is {digest[:12]})",
                    where=str(path),
                    fix="Name another folder, or remove this one.",
                )
        elif [e for e in entries if not e.startswith(f".{MARK}.")]:
            raise RunError("the folder holds files that are no features of graphopt", where=str(path), fix="Name a new folder.")
        else:
            write_atomically(mark, json.dumps({"graphopt": FORMAT, "digest": digest}).encode())

    def _file(self, layout: Layout, kind: str) -> Path:
        return self.path / f"{layout.key}.{kind}"

    def open(self, layout: Layout) -> Store | None:
        """The entry, if it is there and every checksum holds; what is damaged is removed."""
        header = _read(self._file(layout, "json"))
        if not header:
            return None
        rows, targets = self._file(layout, "rows"), self._file(layout, "targets")
        try:
            sizes = rows.stat().st_size, targets.stat().st_size
        except OSError:
            sizes = (-1, -1)
        if {k: header.get(k) for k in layout.table()} == layout.table() and sizes == (layout.bytes, layout.rows * 8):
            store = Store(layout, _map(rows, layout), torch.frombuffer(bytearray(targets.read_bytes()), dtype=torch.int64))
            sums = [zlib.crc32(bits(store.features[a:b])) for a, b in map(layout.span, range(layout.chunks))]
            if sums == header.get("sums") and zlib.crc32(bits(store.targets)) == header.get("targets"):
                return store
        self.remove(layout)
        return None

    def remove(self, layout: Layout) -> None:
        """Take an entry away, the file that makes it exist first."""
        for kind in ("json", "rows", "targets", "part", "progress"):
            self._file(layout, kind).unlink(missing_ok=True)

    @contextmanager
    def filling(self, layout: Layout) -> Iterator[FileFill]:
        """The right to fill an entry: others wait. Raises OSError when the disk has no room for it."""
        lock = os.open(self.path / f"{layout.key}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        fill = None
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            fill = FileFill(self, layout)
            yield fill
        finally:
            if fill is not None:
                fill.close()
            os.close(lock)
            (self.path / f"{layout.key}.lock").unlink(missing_ok=True)


class FileFill:
    """An entry on disk while it is filled. `done` chunks are there already, from a fill that was interrupted."""

    def __init__(self, folder: Folder, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._part = folder._file(layout, "part")
        progress = _read(folder._file(layout, "progress"))
        self.sums: list[int] = []
        self.targets = torch.zeros(layout.rows, dtype=torch.int64)
        if {k: progress.get(k) for k in layout.table()} == layout.table() and self._part.exists():
            self._resume(progress)
        self.done = len(self.sums)
        self._handle = os.open(self._part, os.O_CREAT | os.O_RDWR, 0o644)
        self._since = 0
        try:
            # All of the room at once: a full disk is known before the first forward pass, and a mapped file never has holes.
            reserve(self._handle, layout.bytes)
        except OSError:
            self.close()
            folder.remove(layout)
            raise

    def _resume(self, progress: dict[str, Any]) -> None:
        with open(self._part, "rb") as file:
            for number, wanted in enumerate(progress.get("sums", [])):
                first, end = self.layout.span(number)
                if zlib.crc32(file.read((end - first) * self.layout.row_bytes)) != wanted:
                    break
                self.sums.append(wanted)
        known = self.layout.span(len(self.sums))[0]
        self.targets[:known] = torch.tensor(progress.get("targets", [])[:known], dtype=torch.int64)

    def write(self, number: int, features: Tensor, targets: Tensor) -> None:
        """Chunk `number`, in turn: features in the layout's dtype, on the CPU. Raises OSError when the disk is full."""
        first, end = self.layout.span(number)
        data = bits(features)
        _write(self._handle, data, first * self.layout.row_bytes)
        self.sums.append(zlib.crc32(data))
        self.targets[first:end] = targets
        self._since += len(data)
        if self._since >= STRIDE:
            self.flush()

    def read(self, rows: Tensor) -> Tensor:
        """Rows that are written, by number (to measure how fast they come)."""
        return _map(self._part, self.layout).index_select(0, rows)

    def flush(self) -> None:
        """Bring what is written to the disk, and record it: an interruption loses nothing of it."""
        os.fsync(self._handle)
        known = self.layout.span(len(self.sums))[0]
        record = {**self.layout.table(), "sums": self.sums, "targets": self.targets[:known].tolist()}
        write_atomically(self.folder._file(self.layout, "progress"), json.dumps(record).encode())
        self._since = 0

    def finish(self) -> Store:
        """The entry, whole from here on."""
        os.fsync(self._handle)
        file = self.folder._file
        write_atomically(file(self.layout, "targets"), bytes(bits(self.targets)))
        os.replace(self._part, file(self.layout, "rows"))
        header = {**self.layout.table(), "sums": self.sums, "targets": zlib.crc32(bits(self.targets))}
        write_atomically(file(self.layout, "json"), json.dumps(header).encode())
        file(self.layout, "progress").unlink(missing_ok=True)
        return Store(self.layout, _map(file(self.layout, "rows"), self.layout), self.targets)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class MemoryFill:
    """An entry in RAM while it is filled. Raises OSError where the machine has not that much left."""

    done = 0

    def __init__(self, layout: Layout) -> None:
        if layout.bytes > available_memory():
            raise OSError(0, "not enough memory")
        self.layout = layout
        self.features = torch.empty(layout.rows, *layout.shape, dtype=layout.dtype)
        self.targets = torch.zeros(layout.rows, dtype=torch.int64)

    def write(self, number: int, features: Tensor, targets: Tensor) -> None:
        first, end = self.layout.span(number)
        self.features[first:end], self.targets[first:end] = features, targets

    def read(self, rows: Tensor) -> Tensor:
        return self.features.index_select(0, rows)

    def flush(self) -> None:
        pass

    def finish(self) -> Store:
        return Store(self.layout, self.features, self.targets)


def reserve(handle: int, size: int) -> None:
    """Give an open file `size` bytes of disk. Raises OSError when there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def available_memory() -> float:
    """Bytes that can be had without swapping, a tenth left alone; infinite where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            figures = dict(line.split(":", 1) for line in file)
        return 0.9 * int(figures["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _map(path: Path, layout: Layout) -> Tensor:
    count = layout.rows * torch.Size(layout.shape).numel()
    return torch.from_file(str(path), shared=False, size=count, dtype=layout.dtype).view(layout.rows, *layout.shape)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
