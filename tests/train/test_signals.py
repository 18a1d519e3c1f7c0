"""A stop signal ends a process that waits, in a call of torch, for one that has died."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from graphopt.train import signals
from graphopt.train.ranks import Ranks
from graphopt.train.signals import StopSignals, heard
from tests.support.ranks import run_ranks


def _waiting(rank: int, when: str) -> None:
    ranks = Ranks.join(60).connected(torch.device("cpu"))
    if rank:
        os._exit(143)
    signals.PATIENCE = 0.1
    with StopSignals():
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ranks.new_group()


@pytest.mark.parametrize("when", ["before", "while it waits"])
def test_a_rank_that_waits_for_a_dead_one_ends_as_the_signal_says(when: str) -> None:
    run_ranks(_waiting, when, ends=143, group=False)


def test_what_returns_in_time_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 10.0)
    others, fd = threading.active_count(), signal.set_wakeup_fd(-1)
    with StopSignals() as stop:
        with heard():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.signum == signal.SIGTERM
    assert StopSignals.current is None
    assert (threading.active_count(), signal.set_wakeup_fd(-1)) == (others, fd)
