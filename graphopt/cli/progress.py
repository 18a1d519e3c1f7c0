"""What a command is doing, said once it takes long."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from graphopt.cli.screen import show_error

#: seconds after which it is said for the first time, and between two times
FIRST, AGAIN = 10.0, 20.0

Item = TypeVar("Item")


class Doing:
    """Says on standard error what a command is doing, once it has taken some seconds, until it ends. Stops nothing.

    Calling it names the part of the work that begins: `doing("tracing the backbone")`.
    """

    def __init__(self) -> None:
        self.doing = "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)
        self._began = time.monotonic()

    def __call__(self, what: str) -> None:
        self.doing = what

    def each(self, what: str, items: Iterable[Item], count: int) -> Iterator[Item]:
        """The items, `count` of them at most; each is made while it is said to be `"<what> 3 of 20"`."""
        self(f"{what} 1 of {count}")
        for number, item in enumerate(items, start=2):
            yield item
            self(f"{what} {min(number, count)} of {count}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        patience = FIRST
        while not self._over.wait(patience):
            show_error(f"after {time.monotonic() - self._began:.0f} s: {self.doing} (Ctrl-C stops it)", "note")
            patience = AGAIN
