"""The ledger of a run: which samples each optimizer step took, on all ranks; and what it proves of each epoch.

The file begins with a line of JSON: the number of training samples, how many a step takes, and how often an epoch takes a sample. That
is once; with repeated augmentation it is several times, in which case an epoch takes that part of the samples (and the last one less often,
where its steps end there). A record per step follows: its number in the run, its epoch, how many processes took it, and its samples:
sorted, as differences of neighbours, in the narrowest dtype that holds them, which is about two bytes a sample. Each record ends with its
CRC-32. Rank 0 writes the file; it is on disk whenever a checkpoint is, and a resumed run cuts it back to the step of its checkpoint.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from torch import Tensor

from graphopt.errors import RunError, listed
from graphopt.files import reason

FORMAT_VERSION = 2
#: step (from 1), epoch, processes, samples, bytes of each
_RECORD = struct.Struct("<QIIIB")
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Step(NamedTuple):
    """One record."""

    step: int  # of the run, from 1
    epoch: int
    ranks: int
    samples: np.ndarray  # (samples,) int64, sorted


class LedgerFile:
    """A ledger while a run writes it; without a path it records nothing."""

    def __init__(self, path: Path | None, samples: int, batch: int, step: int = 0, repeats: int = 1) -> None:
        """Opens a new ledger, or that of a run that continues after `step` steps.

        Raises RunError if the ledger that is there is damaged, does not have these steps, or is of other data.
        """
        self._path = path
        if path is None:
            return
        head = {"graphopt": FORMAT_VERSION, "samples": samples, "batch": batch, "repeats": repeats}
        try:
            if step:
                self._file: IO[bytes] = path.open("rb+")
                self._file.truncate(self._end(head, step))
                self._file.seek(0, os.SEEK_END)
            else:
                self._file = path.open("wb")
                self._file.write(json.dumps(head).encode() + b"\n")
        except OSError as error:
            raise RunError(f"the ledger cannot be opened: {reason(error)}", where=str(path), fix=_WITHOUT) from error

    def _end(self, head: object, step: int) -> int:
        """The byte after the record of `step`."""
        found, where = _head(self._file, self._path), str(self._path)
        if found != head:
            raise RunError(f"the ledger is of other data ({found}, now {head})", where=where, fix=_WITHOUT)
        end, last = self._file.tell(), 0
        if step:
            for record in _records(self._file, self._path, found["batch"]):
                end, last = self._file.tell(), record.step
                if last >= step:
                    break
        if last != step:
            raise RunError(f"the ledger ends at step {last}, the checkpoint is of step {step}", where=where, fix=_WITHOUT)
        return end

    def add(self, step: int, epoch: int, samples: Tensor) -> None:
        """Records the step with this number (from 1): `samples` (processes, samples of each) int64."""
        if self._path is None:
            return
        numbers = np.sort(samples.numpy(), axis=None)
        gaps = np.diff(numbers, prepend=0)
        width = next(width for width, dtype in _DTYPES.items() if gaps.max(initial=0) <= np.iinfo(dtype).max)
        record = _RECORD.pack(step, epoch, len(samples), len(gaps), width) + gaps.astype(_DTYPES[width]).tobytes()
        self._try(self._file.write, record + zlib.crc32(record).to_bytes(4, "little"))

    def sync(self) -> None:
        """Brings all records to the disk, which a checkpoint of their step needs."""
        if self._path is not None:
            self._try(self._file.flush)
            self._try(os.fsync, self._file.fileno())

    def close(self) -> None:
        if self._path is not None:
            self._try(self._file.close)

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except OSError as error:
            fix = "Make room, then continue with --resume"
            raise RunError(f"the ledger could not be written: {reason(error)}", where=str(self._path), fix=fix) from error


@dataclass(frozen=True)
class EpochCheck:
    """What a ledger says of one epoch."""

    epoch: int
    steps: int
    samples: int  # of the training set
    once: int  # how many samples were taken exactly once, or as often as the run repeats them
    left_out: tuple[int, ...]  # of a finished epoch: samples that no step took
    repeated: tuple[int, ...]  # samples that were taken more often
    remainder: int  # how many a whole epoch leaves out, because they do not fill a step, or others are repeated in their place
    finished: bool
    ranks: tuple[int, ...]  # numbers of processes that took its steps, in order
    repeats: int = 1
    rest: int = 0  # of a finished epoch that repeats samples: how often the last step took its last one, where that is less often

    @property
    def right(self) -> bool:
        """Whether no sample was taken too often, and a finished epoch took as many of them, as often, as it should."""
        partly = int(self.rest > 0)
        whole = len(self.left_out) == self.remainder and self.once + partly + self.remainder == self.samples
        return not self.repeated and (not self.finished or whole)

    def __str__(self) -> str:
        often = "once" if self.repeats == 1 else f"{self.repeats} times"
        parts = [f"{self.once} of {self.samples} samples exactly {often}"]
        if self.rest:
            parts.append(f"the last one {self.rest} times")
        if self.repeated:
            parts.append(f"more than {often} {listed(map(str, self.repeated))}")
        if self.left_out:
            expected = "the remainder after the last whole step" if self.repeats == 1 else f"an epoch takes 1 / {self.repeats} of them"
            why = expected if len(self.left_out) == self.remainder else "MISSING"
            parts.append(f"not at all {listed(map(str, self.left_out))} ({why})")
        if not self.finished:
            parts.append("not finished")
        processes = ", then ".join(map(str, self.ranks))
        return f"epoch {self.epoch}: {'; '.join(parts)}; {self.steps} steps, processes: {processes}"


def check_ledger(path: Path, steps: int | None = None) -> tuple[EpochCheck, ...]:
    """Counts how often each epoch took each sample, from a ledger; `steps` is how many a finished run took.

    Raises RunError if the file is damaged, a step is missing in it, or its epochs do not follow each other.
    """
    fix = "Restore the file from a copy: without it, nothing is proved of this run"
    found: list[EpochCheck] = []
    try:
        with path.open("rb") as file:
            head = _head(file, path)
            samples, batch, repeats = int(head["samples"]), int(head["batch"]), int(head["repeats"])
            whole = samples // batch
            counts, last, ranks = np.zeros(samples, np.int64), 0, list[int]()

            def close() -> None:
                finished = (taken := last - whole * len(found)) == whole
                left_out = np.flatnonzero(counts == 0) if finished else ()
                numbers = tuple(map(int, left_out)), tuple(map(int, np.flatnonzero(counts > repeats)))
                remainder = samples - -(-whole * batch // repeats)
                rest = whole * batch % repeats if finished else 0
                figures = int((counts == repeats).sum()), *numbers, remainder, finished, tuple(dict.fromkeys(ranks))
                found.append(EpochCheck(len(found), taken, samples, *figures, repeats, rest))
                counts[:] = 0
                ranks.clear()

            for record in _records(file, path, batch, torn=steps is None):
                if record.epoch != (record.step - 1) // whole or record.samples.max(initial=0) >= samples:
                    raise RunError(f"the ledger is damaged: the record of step {record.step} is impossible", where=str(path), fix=fix)
                if record.epoch > len(found):
                    close()
                last = record.step
                np.add.at(counts, record.samples, 1)
                ranks.append(record.ranks)
            if last:
                close()
    except OSError as error:
        raise RunError(f"the ledger cannot be read: {reason(error)}", where=str(path), fix=fix) from error
    if steps is not None and last != steps:
        raise RunError(f"the ledger is damaged: it ends at step {last}, the run took {steps}", where=str(path), fix=fix)
    return tuple(found)


def _head(file: IO[bytes], path: Path | None) -> dict[str, Any]:
    try:
        head = json.loads(file.readline(1000))
        if head["graphopt"] == FORMAT_VERSION and 0 < head["batch"] <= head["samples"] < 2**31 and head["repeats"] > 0:
            return dict(head)
    except (ValueError, TypeError, KeyError):
        pass
    raise RunError("is not a ledger of this version of graphopt, or is damaged", where=str(path), fix=_WITHOUT)


def _records(file: IO[bytes], path: Path | None, batch: int, *, torn: bool = True) -> Iterator[Step]:
    """The records from the file's position on. With `torn`, one that was cut off in writing may end the file."""
    number = 0
    while header := file.read(_RECORD.size):
        number += 1
        sums, record = b"", header
        if len(header) == _RECORD.size:
            step, epoch, ranks, count, width = _RECORD.unpack(header)
            size = count * width
            record = header + file.read(size) if (step, count) == (number, batch) and width in _DTYPES else b""
            sums = file.read(4)
        if sums != zlib.crc32(record).to_bytes(4, "little"):
            if torn and not file.read(1) and len(sums) < 4:
                return
            raise RunError(f"the ledger is damaged at the record of step {number}", where=str(path), fix=_WITHOUT)
        gaps = np.frombuffer(record, _DTYPES[width], offset=_RECORD.size)
        yield Step(step, epoch, ranks, np.cumsum(gaps, dtype=np.int64))


_WITHOUT = "Restore the file, start a new run, or continue without a proof (train.ledger = false)"
