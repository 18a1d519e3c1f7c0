"""Ctrl-C and SIGTERM request a stop; the run stops after the step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from graphopt.errors import RunError


class Stopped(RunError):
    """A run that stopped on request and can be resumed. Its exit code is 128 + the signal's number, as in shells."""

    def __init__(self, what: str, *, signum: int = signal.SIGINT, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signum


class StopSignals:
    """While open, the first Ctrl-C or SIGTERM only sets `signum`; the second has its usual effect.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
