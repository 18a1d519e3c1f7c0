"""One thread, one seed, no network: tests mean the same on every machine."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.support.browser import browse, tab  # noqa: F401  # fixtures


def pytest_configure(config: pytest.Config) -> None:
    """Loads torch, but not in a process that runs no tests itself and starts those that do: they would wait for it."""
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the graphs in tests/golden anew")
