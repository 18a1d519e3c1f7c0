"""Ranks stop together, at a step they agree on, and go on: bit for bit as many as before, within rounding another number of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from graphopt import Plan
from graphopt.data.loader import Data
from graphopt.passes.freeze import Freeze
from graphopt.spec import TrainSpec
from graphopt.train import Stopped, train
from tests.distributed import cases
from tests.support.ranks import run_ranks
from tests.train import small

#: dropout and running statistics are each rank's own; the phase changes after the stop
HARD: dict[str, Any] = {"norm": nn.BatchNorm2d, "drop": 0.3}


def _plan(seed: int = 0, **options: Any) -> Plan:
    return cases.plan((Freeze(select="blocks.0", when={"epoch": 1}),), seed=seed, **options)


def _settings(**changes: Any) -> TrainSpec:
    return small.settings(**{"epochs": 2, "batch": 12, "ema": 0.9, "optimizer": cases.ADAMW, "log_every": 1, **changes})


def _data(stop: int = 0, *, evaluating: int = 0) -> Data:
    """With `stop`, this process gets a signal when it reads that training image; with `evaluating`, at that image of an evaluation."""
    data = cases.data(training=48, evaluation=60)
    for samples, after in ((data.train, stop), (data.evaluation, evaluating)):
        samples.transform = small.Counting(samples.transform, after)
    return data


def _stopped_on_one_rank(rank: int, folder: Path) -> None:
    train(_plan(**HARD), folder / "whole", settings=_settings(), data=_data())
    for name, options in (("bits", HARD), ("rounding", {})):
        with pytest.raises(Stopped) as stopped:
            train(_plan(**options), folder / name, settings=_settings(), data=_data(stop=7 if rank == 1 else 0))
        assert stopped.value.exit_code == 143, stopped.value
        (folder / f"{name}-{rank}").write_text(str(stopped.value.silent))
    train(_plan(seed=7, **HARD), folder / "bits", settings=_settings(), data=_data(), resume=True)
    _stopped_soon(rank, folder / "soon")


def _stopped_soon(rank: int, folder: Path) -> None:
    """How long a stop takes, which one rank alone is asked for: a step of training, a batch of evaluation; then to the end."""
    total = 0
    for number in (2, 1, 2):
        data = _data(stop=6 * (number - 1) + 1 if rank == 1 else 0)  # in this step of the sitting
        with pytest.raises(Stopped):
            train(_plan(**HARD), folder, settings=_settings(), data=data, resume=True)
        if rank == 0:  # which has written the checkpoint
            done = cases.content(folder)["progress"]["total"]
            assert done - total <= number + 1
            total = done
    data = _data(evaluating=7 if rank == 1 else 0)  # in the second of five batches
    with pytest.raises(Stopped):
        train(_plan(**HARD), folder, settings=_settings(), data=data, resume=True)
    assert -data.evaluation.transform.left + (7 if rank == 1 else 0) <= 3 * 6
    assert rank or cases.content(folder)["progress"]["epoch"] == 1
    train(_plan(**HARD), folder, settings=_settings(), data=_data(), resume=True)


def _go_on(_rank: int, folder: Path) -> None:
    train(_plan(seed=7), folder, settings=_settings(), data=_data(), resume=True)


def test_ranks_go_on_after_a_stop(tmp_path: Path) -> None:
    run_ranks(_stopped_on_one_rank, tmp_path)
    whole, bits = (cases.content(tmp_path / name) for name in ("whole", "bits"))
    for part in ("phase", "history", "buffers", "decisions"):
        assert cases.distance(whole[part], bits[part])[0] == 0, part
        assert cases.distance(whole[part], cases.content(tmp_path / "soon")[part])[0] == 0, part
    assert [(r["step"], r["loss"]) for r in small.records(tmp_path / "bits", "step")] == [
        (r["step"], r["loss"]) for r in small.records(tmp_path / "whole", "step")
    ]
    assert {(tmp_path / f"bits-{rank}").read_text() for rank in (0, 1)} == {"True", "False"}, "one rank tells it"

    stopped = tmp_path / "rounding"
    assert 0 < cases.content(stopped)["progress"]["total"] < 4, "in the middle of an epoch"
    train(_plan(), tmp_path / "alone", settings=_settings(), data=_data())
    for ranks in (1, 3):
        folder = tmp_path / f"by-{ranks}"
        shutil.copytree(stopped, folder)
        run_ranks(_go_on, folder, ranks=ranks)
        one, other = cases.content(folder), cases.content(tmp_path / "alone")
        for part in ("model", "ema", "optimizer"):
            assert cases.distance(one["phase"][part], other["phase"][part])[0] < 1e-12, (ranks, part)
        assert os.path.exists(folder / "summary.json")
