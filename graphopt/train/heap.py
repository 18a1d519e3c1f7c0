"""The memory that a step frees stays with the process for the next step (glibc).

By default glibc gives the free end of the heap back to the system after many steps, and gets it again page by page in the next one: up to
8 % of a step's processor time on the CPU (tools/tables/heap.md). PyTorch's own allocator does the same for CUDA.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: parameters of mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: bytes from which on an allocation is apart from the heap; glibc's own adjustment ends at this number, and at twice it for trimming
_LARGEST = 32 << 20
#: names of environment variables by which a user has set these parameters
_SET_BY_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


@contextmanager
def kept_heap() -> Iterator[None]:
    """Inside, freed memory stays with the process; what is free at the end goes back to the system. Without glibc, it does nothing."""
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _SET_BY_USER):
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, -1)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        release_free_memory()


def release_free_memory() -> None:
    """Gives what is free back to the system, so that what is resident is what is in use."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process, or None where it does not have these functions."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
