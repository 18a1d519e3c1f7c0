"""Memory that a step frees serves the next step, and goes back to the system after the run."""

import resource
import sys
from unittest.mock import Mock

import pytest
import torch

from graphopt.train import heap
from graphopt.train.heap import kept_heap
from graphopt.train.strategy import _resident
from tests.support.ranks import run_process

BLOCKS, SIZE = 24, 2**22  # 96 MiB: more than glibc keeps by itself
PAGES = BLOCKS * SIZE // resource.getpagesize()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")


def page_faults(steps: int = 4) -> int:
    """Of the last of some steps that allocate, write and free all blocks."""
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(SIZE // 4) for _ in range(BLOCKS)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def steps_of_a_run() -> None:
    before = _resident("RSS")
    with kept_heap():
        assert page_faults() < PAGES // 10
        assert _resident("RSS") > before + BLOCKS * SIZE * 0.9
    assert _resident("RSS") < before + BLOCKS * SIZE * 0.1


def test_a_step_takes_no_pages_that_the_step_before_has_freed() -> None:
    assert run_process(steps_of_a_run) == 0


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Mock()
    monkeypatch.setattr(heap, "_glibc", lambda: libc)
    with kept_heap():
        pass
    assert libc.mallopt.called
    libc.reset_mock()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with kept_heap():
        pass
    assert not libc.mallopt.called
