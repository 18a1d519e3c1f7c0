"""The ledger: every epoch takes every sample exactly once, through stops, kills and other numbers of processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from graphopt import RunError
from graphopt.cli import main
from graphopt.spec import AugmentSpec, from_table
from graphopt.train import Stopped, train
from graphopt.train.ledger import LedgerFile, check_ledger
from graphopt.train.run import Run
from tests.support.ranks import run_process, run_ranks
from tests.train import small

#: 96 samples in steps of 18: six are left over
SETTINGS = small.settings(epochs=3, batch=18, checkpoint_steps=2)


def _train(rank: int, folder: str, stop: int = 0) -> None:
    """Trains, or goes on; a run that is to stop gets its signal on the last rank alone, before the step with that number."""
    torch.set_num_threads(1)
    save = Run._batches

    def batches(run, *more):
        for batch in save(run, *more):
            if stop and run.progress.total + 1 == stop and rank == torch.distributed.get_world_size() - 1:
                run.signals.signum = signal.SIGTERM
            yield batch

    Run._batches = batches
    try:
        train(small.plan(drop=0.0), folder, settings=SETTINGS, data=small.DATA, resume=True)
    except Stopped:
        assert stop
    finally:
        Run._batches = save


def _killed(folder: str, step: int) -> None:
    """Trains until the kernel ends it, with records that no checkpoint has."""
    add = LedgerFile.add

    def adding(ledger, number, *more):
        add(ledger, number, *more)
        if number == step:
            ledger._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    LedgerFile.add = adding
    train(small.plan(drop=0.0), folder, settings=SETTINGS, data=small.DATA, resume=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    train(small.plan(drop=0.0), folder, settings=SETTINGS, data=small.DATA)
    return folder


def test_each_epoch_takes_each_sample_once_and_names_the_remainder(single):
    epochs = check_ledger(single / "ledger.bin", 15)
    assert [(e.epoch, e.steps, e.once, e.remainder, len(e.left_out), e.right) for e in epochs] == [(n, 5, 90, 6, 6, True) for n in range(3)]
    assert "90 of 96 samples exactly once" in str(epochs[0])
    assert "remainder" in str(epochs[0])
    assert (single / "ledger.bin").stat().st_size < 15 * (18 * 2 + 25) + 80


def test_through_a_kill_a_stop_and_other_numbers_of_processes(tmp_path, single):
    folder = tmp_path / "run"
    assert run_process(_killed, str(folder), 4) == -signal.SIGKILL
    run_ranks(_train, str(folder), 8, ranks=2)
    run_ranks(_train, str(folder), ranks=3)
    found, expected = (check_ledger(path / "ledger.bin", 15) for path in (folder, single))
    assert [(e.once, e.left_out, e.right) for e in found] == [(e.once, e.left_out, e.right) for e in expected]
    assert [e.ranks for e in found] == [(1, 2), (2, 3), (3,)]


@pytest.mark.parametrize("how", ["bit", "cut", "head", "twice", "short"])
def test_a_damaged_ledger_is_one_clear_error(tmp_path, single, how):
    content = bytearray((single / "ledger.bin").read_bytes())
    start = content.index(b"\n") + 1
    if how == "bit":
        content[start + 40] ^= 1
    elif how == "cut":
        del content[start + 30 : start + 34]
    elif how == "head":
        content[2] ^= 1
    elif how == "twice":
        content += content[start:]
    else:
        del content[-20:]
    (tmp_path / "ledger.bin").write_bytes(content)
    with pytest.raises(RunError, match="ledger"):
        check_ledger(tmp_path / "ledger.bin", 15)
    if how not in ("twice", "short"):
        with pytest.raises(RunError, match=r"train\.ledger = false"):
            LedgerFile(tmp_path / "ledger.bin", 96, 18, 15)


def test_a_sample_taken_twice_is_found(tmp_path):
    ledger = LedgerFile(tmp_path / "ledger.bin", 6, 2)
    for step, samples in enumerate(([0, 1], [1, 2], [3, 4]), start=1):
        ledger.add(step, 0, torch.tensor([samples]))
    ledger.close()
    (epoch,) = check_ledger(tmp_path / "ledger.bin")
    assert (epoch.repeated, epoch.left_out, epoch.right) == ((1,), (5,), False)
    assert "more than once 1" in str(epoch)
    assert "5 (MISSING)" in str(epoch)


def test_an_epoch_of_repeated_images_is_proved(tmp_path):
    data = small.DATA.model_copy(update={"augment": AugmentSpec(crop="pad", repeats=4)})
    train(small.plan(), tmp_path / "run", settings=small.settings(epochs=2, batch=18), data=data)
    epochs = check_ledger(tmp_path / "run" / "ledger.bin", 10)
    assert [(e.once, e.rest, e.remainder, e.right) for e in epochs] == [(22, 2, 73, True)] * 2
    assert str(epochs[1]).startswith("epoch 1: 22 of 96 samples exactly 4 times; the last one 2 times; not at all ")


@pytest.mark.parametrize("steps", [[[0, 0, 1], [2, 2, 0]], [[0, 0, 1], [1, 2, 3]]], ids=["too often", "not often enough"])
def test_repeats_that_are_not_even_are_found(tmp_path, steps):
    ledger = LedgerFile(tmp_path / "ledger.bin", 6, 3, repeats=2)
    for step, samples in enumerate(steps, start=1):
        ledger.add(step, 0, torch.tensor([samples]))
    ledger.close()
    assert not check_ledger(tmp_path / "ledger.bin")[0].right


def test_the_report_says_it_and_fails_where_it_is_not_so(tmp_path, capsys):
    spec = from_table(
        {
            "backbone": {"source": "cifar", "name": "resnet8", "input": [3, 8, 8]},
            "data": {"name": "digits", "train_limit": 40, "eval_limit": 10},
            "train": {"epochs": 1, "batch": 16, "device": "cpu", "ledger": True},
        }
    )
    train(spec, tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--no-costs"]) == 0
    assert "epoch 0: 32 of 40 samples exactly once" in capsys.readouterr().out
    assert "exactly once" in (tmp_path / "run" / "report.html").read_text()
    ledger = LedgerFile(tmp_path / "run" / "ledger.bin", 40, 16)
    ledger.add(1, 0, torch.arange(16)[None])
    ledger.add(2, 0, torch.arange(16)[None])
    ledger.close()
    assert main(["report", str(tmp_path / "run"), "--no-costs"]) == 1
    assert "MISSING" in capsys.readouterr().out
