"""One thread, one seed, no network: tests mean the same on every machine."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.support.browser import browse, tab  # noqa: F401  # fixtures

#: a file system in memory: a run asks a dozen times for its files to be on the disk, which takes longer than its steps
MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """Says where tests write, and loads torch, but not in a process that starts those that run tests: they would wait for it."""
    if os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC and shutil.disk_usage(MEMORY).free > 2**31:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    from hypothesis import settings

    from graphopt.cli import progress

    progress.FIRST = 3600.0  # however slow the machine is, commands print the same
    torch.set_num_threads(1)
    settings.register_profile("graphopt", deadline=None, max_examples=40)
    settings.load_profile("graphopt")


def pytest_collection_finish() -> None:
    """Takes the objects of the imported libraries, a million, out of what the collector looks through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


#: bytes by which a process may grow until it is worth half a second to look for what nothing holds any more
GROWTH = 2**29
_resident = 0


def pytest_runtest_logfinish() -> None:
    """Frees modules and plans, which refer to themselves, before they fill the memory: the collector counts objects, not bytes."""
    global _resident
    if _resident_bytes() > _resident + GROWTH:
        gc.collect()
        _resident = _resident_bytes()


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a system without it
        return 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the graphs in tests/golden anew")
