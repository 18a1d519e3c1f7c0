"""Figures of a run: running means, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import RunError
from graphopt.files import reason


class Meter:
    """Sums of loss and correct predictions over samples, on the device, so that no step waits for them."""

    def __init__(self) -> None:
        self.samples = 0
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, correct: Tensor, samples: int) -> None:
        """Adds `samples` samples: `loss` is their mean loss, `correct` how many predictions were right (both scalars)."""
        sums = torch.stack([loss.detach().double() * samples, correct.detach().double()])
        self._sums = sums if self._sums is None else self._sums + sums
        self.samples += samples

    @property
    def loss(self) -> float:
        """Mean loss so far; NaN before the first sample."""
        return self._mean(0)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions so far, 0 to 1; NaN before the first sample."""
        return self._mean(1)

    def _mean(self, index: int) -> float:
        return float(self._sums[index]) / self.samples if self._sums is not None else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"samples": self.samples, "sums": None if self._sums is None else self._sums.tolist()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Meter:
        """The inverse of `state_dict()`."""
        meter = cls()
        meter.samples = state["samples"]
        if state["sums"] is not None:
            meter._sums = torch.tensor(state["sums"], dtype=torch.float64, device=device)
        return meter


class MetricsLog:
    """metrics.jsonl, one JSON object per line, and on request the same in TensorBoard.

    A checkpoint stores `tell()`; a resumed run truncates the file there, so that steps trained twice are logged once.
    """

    def __init__(self, path: Path, *, offset: int = 0, tensorboard: Path | None = None, step: int = 0) -> None:
        try:
            self._file = path.open("ab")
            self._file.truncate(min(offset, path.stat().st_size))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise RunError(f"cannot be written: {reason(error)}", where=str(path)) from error
        self._path = path
        self._board = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RunError("TensorBoard is not installed", fix="Run `pip install tensorboard`") from error
            self._board = SummaryWriter(str(tensorboard), purge_step=step or None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; numbers of an epoch or a step also go to TensorBoard under its `kind`."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            fix = "Make room, then continue with --resume"
            raise RunError(f"could not be written: {reason(error)}", where=str(self._path), fix=fix) from error
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                    self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def tell(self) -> int:
        """Bytes written so far, all of them on disk."""
        with suppress(OSError):  # a checkpoint must not fail because of its log
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
