"""Checkpoints that a thread writes: training goes on meanwhile, what is written is the state of its step, and nothing gets lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt import RunError
from graphopt.hashing import content_digest
from graphopt.train import Stopped, Summary, train
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.folder import RunFolder
from graphopt.train.phase import Phase
from tests.train import small

Save = Callable[..., None]


def go(folder: Path, **more: Any) -> Summary:
    settings = small.settings(epochs=1, checkpoint_steps=2, checkpoint_async=True, ema=0.9, ledger=False)
    return train(small.plan(drop=0.0), folder, settings=settings, **{"data": small.interrupting(10**9), **more})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save ends only after a further step; it holds the state of its own."""
    further, step, save, seen = threading.Event(), Phase.step, RunFolder.save, []

    def stepped(phase: Phase, batches: Any, done: int) -> Any:
        found = step(phase, batches, done)
        if done == 2:
            further.set()
        return found

    def late(folder: RunFolder, state: Any, **more: Any) -> None:
        assert further.wait(60)
        save(folder, state, **more)
        seen.append((state["progress"]["total"], content_digest(load_checkpoint(folder.last)["phase"]["optimizer"])))

    monkeypatch.setattr(Phase, "step", stepped)
    monkeypatch.setattr(RunFolder, "save", late)
    go(tmp_path / "async")
    assert [total for total, _ in seen] == [2, 4, 6, 6]
    monkeypatch.undo()
    with pytest.raises(Stopped):
        go(tmp_path / "stopped", data=small.interrupting(2 * 16 - 4))  # in the second step
    stopped = load_checkpoint(tmp_path / "stopped" / "last.pt")
    assert stopped["progress"]["total"] == 2, "a stop waits for its checkpoint"
    assert content_digest(stopped["phase"]["optimizer"]) == seen[0][1]
    go(tmp_path / "stopped", resume=True)
    assert small.same(small.weights(tmp_path / "stopped"), small.weights(tmp_path / "async"))


@pytest.mark.parametrize("failing", [1, 4], ids=["in the middle", "at the end"])
def test_a_save_that_failed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    save, count = RunFolder.save, [0]

    def refused(folder: RunFolder, state: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] == failing:
            raise RunError("could not be written: no space left on device", where=str(folder.last))
        save(folder, state, **more)

    monkeypatch.setattr(RunFolder, "save", refused)
    with pytest.raises(RunError, match="no space left on device"):
        go(tmp_path / "run")
    assert count[0] == failing, "no save after the one that failed"
    assert not (tmp_path / "run" / "summary.json").exists()
