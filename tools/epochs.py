"""Epochs of a run in turns with something else, in one process: `runner_bench.py` and `scaling.py` compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from graphopt.train.run import Run


@contextmanager
def trained_by(around: Callable[[Run, Callable[[], bool]], bool]) -> Iterator[None]:
    """Inside, `around` is called in place of what trains a run up to its next phase: in a run without phases, one epoch.

    It gets the run and that function, and returns what that returned.
    """
    train_on = Run._train_on

    def replaced(self: Run) -> bool:
        return around(self, partial(train_on, self))

    Run._train_on = replaced  # type: ignore[method-assign]  # until this context ends
    try:
        yield
    finally:
        Run._train_on = train_on  # type: ignore[method-assign]  # its own again
