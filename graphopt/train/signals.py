"""Stop signals: how a run hears of them, also while torch waits for other processes."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, Self

_STOP = (signal.SIGINT, signal.SIGTERM)
#: seconds that a call which connects ranks has to return after a stop signal; torchrun kills after 30
PATIENCE = 5.0


class StopSignals:
    """While open, the first Ctrl-C or SIGTERM sets `signum`, the second has its usual effect; does nothing outside the main thread."""

    current: ClassVar["StopSignals | None"] = None

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if _in_main_thread():
            self._before = {number: signal.signal(number, self._record) for number in _STOP}
            StopSignals.current = self
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *_: object) -> None:
        self._restore()
        if StopSignals.current is self:
            StopSignals.current = None


@contextmanager
def heard() -> Iterator[None]:
    """While open, a stop signal ends this process `PATIENCE` seconds later, with 128 + its number as status.

    For calls in which torch connects processes: Python's handlers run when such a call returns, and it waits many minutes for a process
    that has died. A launcher that has sent SIGTERM would wait as long for this one. Does nothing outside the main thread.
    """
    if not _in_main_thread():
        yield
        return
    told, bell = socket.socketpair()
    bell.setblocking(False)
    closed = threading.Event()

    def watch() -> None:
        while number := told.recv(1):
            if number[0] in _STOP:
                if not closed.wait(PATIENCE):
                    os._exit(128 + number[0])
                return

    watching = threading.Thread(target=watch, name="signals", daemon=True)
    watching.start()
    before = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)  # gets the number of each signal that has a handler in Python
    try:
        if StopSignals.current is not None and StopSignals.current.signum:
            bell.send(bytes([StopSignals.current.signum]))
        yield
    finally:
        signal.set_wakeup_fd(before)
        closed.set()
        bell.close()
        watching.join()
        told.close()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
