"""Python's cyclic garbage collector at rest."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Runs no automatic garbage collection inside; what reference counts alone tell to be unused is freed as ever.

    A graph is many small objects that lead to each other and stay: each collection walks through all of them and frees nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
