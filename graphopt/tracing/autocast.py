"""Contexts of autocast in a forward. A graph has none, and a network that sets its own must not lose it in silence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Contexts:
    """How many contexts of autocast are open. `counts` says whether one that is entered now is the forward's own."""

    counts: Callable[[], bool]
    open: int = 0


@contextmanager
def counted(contexts: Contexts) -> Iterator[None]:
    """Inside, contexts that are entered and left are counted."""
    kind: Any = torch.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def entered(context: Any) -> Any:
        contexts.open += contexts.counts()
        return enter(context)

    def left(context: Any, *error: Any) -> Any:
        contexts.open -= contexts.counts()
        return leave(context, *error)

    kind.__enter__, kind.__exit__ = entered, left
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave
