"""Sizes that depend on the batch, while a backbone is traced: which they are, and what is known of them all the same."""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

#: samples in the values that proxies carry; a size that is a multiple of this prime depends on the batch
BATCH = 1009
_COMPARISONS: tuple[Any, ...] = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)


class Shape(tuple[Any, ...]):
    """A tensor's shape while tracing: numbers, and nodes where a size depends on the batch."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found

    def numel(self) -> Any:
        """The number of elements."""
        total: Any = 1
        for size in self:
            total = total * size
        return total


def depends_on_batch(value: Any) -> bool:
    """Whether a number, or one of several, grows with the batch."""
    if isinstance(value, tuple):
        return any(map(depends_on_batch, value))
    return type(value) is int and value != 0 and value % BATCH == 0


def same_for_any_batch(function: Any, values: Sequence[Any]) -> bool:
    """Whether a comparison has one answer for all batches: of two sizes that grow with the batch, or of one with zero or less."""
    if function not in _COMPARISONS or not all(type(value) is int for value in values):
        return False
    grows = [value > 0 and depends_on_batch(value) for value in values]
    return any(grows) and all(g or (value <= 0 and not depends_on_batch(value)) for g, value in zip(grows, values, strict=True))


@contextmanager
def replaced_len(root: nn.Module, length: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the Python files of the modules of `root` get `length` where they write `len`, which could give them nothing but a number."""
    files = {cls.__module__ for kind in {type(part) for part in root.modules()} for cls in kind.__mro__}
    own = [vars(sys.modules[file]) for file in files if file in sys.modules and file.partition(".")[0] not in ("torch", "builtins")]
    spaces = [space for space in own if "len" not in space]
    for space in spaces:
        space["len"] = length
    try:
        yield
    finally:
        for space in spaces:
            space.pop("len", None)
