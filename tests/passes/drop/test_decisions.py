"""Decisions by measurement, through the runner: the same after a resume, for drop and for freeze."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graphopt.errors import RunError
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train
from graphopt.train.checkpoint import load_checkpoint
from tests.train import small

DATA = DataSpec(name="digits", train_limit=64, eval_limit=16)
TRAIN = TrainSpec(epochs=6, batch=16, device="cpu", optimizer={"name": "sgd", "lr": 0.02})
BLOCKS = ["stem", "blocks.0", "blocks.1"]


def run(folder: Path, value, resume: bool = False):
    return train(small.plan([value], drop=0.1), folder, settings=TRAIN, data=DATA, resume=resume)


def state_of(folder: Path):
    state = load_checkpoint(folder / "last.pt")
    return state["decisions"], state["phase"]["model"]


@pytest.mark.parametrize(
    "value",
    [
        Drop(when={"score": ["change", "continuation"], "below": [0.5, 1.1], "patience": 1, "most": 0.75, "by": 5}, force=True),
        Freeze(select=BLOCKS, when={"score": "change", "below": 0.5, "patience": 1, "most": 1.0, "by": 5}),
        Freeze(select=BLOCKS, when={"schedule": "freezeout", "t0": 0.5}),
    ],
    ids=["drop by score", "freeze by score", "freezeout"],
)
def test_decisions_fire_in_order_and_survive_a_resume(tmp_path, monkeypatch, value):
    from graphopt.train.run import Run

    summary = run(tmp_path / "whole", value)
    taken = [(p["epoch"], d["regions"]) for p in summary.phases for d in p["decisions"]]
    assert len(taken) > 1, "more than one decision"
    order = [name for _, names in taken for name in names]
    assert order == sorted(order, key=["stem", *(f"blocks.{i}" for i in range(4))].index)
    decisions, weights = state_of(tmp_path / "whole")

    closed = Run._close_epoch

    def stopping(self):
        closed(self)
        if self.progress.epoch == 3:
            raise RunError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_close_epoch", stopping)
        with pytest.raises(RunError, match="cut off"):
            run(tmp_path / "run", value)
    run(tmp_path / "run", value, resume=True)
    again, same = state_of(tmp_path / "run")
    assert again == decisions
    assert all(torch.equal(weights[k], same[k]) for k in weights)


def test_change_is_logged_per_region(tmp_path):
    run(tmp_path / "run", Drop(when={"score": "change", "below": 1e-9}))
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    changes = [e["change"] for e in epochs if e["kind"] == "epoch"]
    assert all(set(c) == {f"blocks.{i}" for i in range(4)} for c in changes)
    assert all(0 < v < 10 for c in changes for v in c.values())
