"""An interrupted run that goes on ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings, strategies

from graphopt import Pass, RunError
from graphopt.spec import AugmentSpec, dumps, from_table, load
from graphopt.train import Stopped, train
from tests.support.ranks import loaded, run_process
from tests.train import small
from tests.train.passes import Extra, Hold

#: Phases change before the second and the third epoch; dropout, augmentation, averages and momentum all have something to lose.
PASSES: list[Pass] = [Hold(select="blocks.0", when={"epoch": 1}), Extra(select="blocks.1", when={"epoch": 1, "until": 2})]
DATA = small.DATA.model_copy(update={"augment": AugmentSpec(crop="pad", hflip=0.5, mixup=0.1)})
HARD: dict[str, Any] = {"ema": 0.9, "clip": 1.0, "accumulate": 2, "batch": 8, "optimizer": {"name": "adamw", "lr": 0.01}}


NEVER = 10**9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert go(folder, NEVER)
    return folder


def go(folder: Path, after: int, *, seed: int = 0, **changes: Any) -> bool:
    """Train, or go on, until the `after`-th image of this sitting; whether it came to its end. `seed` gives weights it must not keep."""
    data = small.interrupting(after, DATA)
    try:
        train(small.plan(PASSES, seed=seed), folder, settings=small.settings(**HARD, **changes), data=data, resume=True)
    except Stopped:
        return False
    return True


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_a_second_interrupt_stops_at_once_and_costs_no_more_than_an_interval(whole: Path, tmp_path: Path) -> None:
    data = small.interrupting(130, DATA, signal.SIGINT)
    data.train.transform = small.Counting(data.train.transform, 131, signal.SIGINT)
    # A shell starts processes in the background without an interrupt.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(small.plan(PASSES), tmp_path, settings=small.settings(**HARD), data=data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(small.records(tmp_path, "epoch")) == 1
    assert go(tmp_path, NEVER)
    assert equal(torch.load(tmp_path / "last.pt", weights_only=True)["phase"], torch.load(whole / "last.pt", weights_only=True)["phase"])


# 96 images an epoch, 16 a step: the first of an epoch, its last, and both sides of the phase changes.
@pytest.mark.parametrize("after", [1, 96, 97, 130, 193])
def test_going_on_ends_where_the_uninterrupted_run_does(tmp_path: Path, whole: Path, after: int) -> None:
    assert not go(tmp_path, after)
    assert go(tmp_path, NEVER, seed=7)
    one, other = (torch.load(p / "last.pt", weights_only=True) for p in (tmp_path, whole))
    for part in ("phase", "history", "buffers", "decisions"):
        assert equal(one[part], other[part]), part
    told = [[(r["step"], r["loss"], r["accuracy"]) for r in small.records(p, "step")] for p in (tmp_path, whole)]
    assert told[0] == told[1]


@pytest.mark.slow
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
@given(stops=strategies.lists(strategies.integers(1, 120), min_size=1, max_size=4))
def test_however_often_it_is_stopped(tmp_path_factory: pytest.TempPathFactory, whole: Path, stops: list[int]) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    # The first sitting's weights are the run's; later ones bring others, which must be replaced.
    for seed, after in enumerate(stops):
        go(folder, after, seed=seed, checkpoint_steps=3)
    assert go(folder, NEVER, seed=9)
    assert small.same(small.weights(folder), small.weights(whole))


def test_a_finished_run_resumes_to_its_summary(tmp_path: Path) -> None:
    first = train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    again = train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA, resume=True)
    assert again == first


def test_more_epochs_go_on_from_a_finished_run(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    summary = train(small.plan(), tmp_path, settings=small.settings(epochs=2), data=small.DATA, resume=True)
    assert summary.epochs == 2
    assert [r["epoch"] for r in small.records(tmp_path, "epoch")] == [0, 1]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    with pytest.raises(RunError, match=r"train\.batch was 16 and is 8"):
        train(small.plan(), tmp_path, settings=small.settings(epochs=2, batch=8), data=small.DATA, resume=True)


def test_other_passes_are_refused(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    with pytest.raises(RunError, match="another spec"):
        train(small.plan([Hold()]), tmp_path, settings=small.settings(epochs=1), data=small.DATA, resume=True)


def test_resuming_where_nothing_is_starts(tmp_path: Path) -> None:
    assert train(small.plan(), tmp_path / "new", settings=small.settings(epochs=1), data=small.DATA, resume=True).epochs == 1


def train_on(file: Path, run: Path) -> None:
    train(load(file, trust=True), run, resume=True, trust=True)


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_where_the_uninterrupted_run_does(tmp_path: Path) -> None:
    here = Path(__file__).parent
    table = {
        "name": "killed",
        "backbone": {"source": "cifar", "name": "resnet8", "input": [3, 8, 8]},
        "pass": [
            {"use": f"{here / 'passes.py'}:Hold", "select": "layer1.**", "when": {"epoch": 1}},
            {"use": f"{here / 'passes.py'}:Extra", "select": "layer3.*", "when": {"epoch": 2}},
        ],
        "data": {"name": "digits", "train_limit": 256, "eval_limit": 40, "augment": {"crop": "pad"}},
        "train": {"epochs": 3, "batch": 16, "checkpoint_steps": 2, "log_every": 1, "ema": 0.9, "device": "cpu"},
    }
    file = tmp_path / "spec.toml"
    file.write_text(dumps(from_table(table, trust=True)))
    train(load(file, trust=True), tmp_path / "whole", trust=True)
    run, draw = tmp_path / "killed", random.Random(0)
    deaths = 0
    for kill_at in sorted(draw.sample(range(2, 46), 3)):
        process = loaded().Process(target=train_on, args=(file, run))
        process.start()
        while process.is_alive() and _steps(run) < kill_at:
            time.sleep(0.002)
        if process.is_alive():
            process.kill()
            deaths += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert deaths
    assert run_process(train_on, file, run) == 0
    assert small.same(small.weights(run), small.weights(tmp_path / "whole"))
    told = [[(r["step"], r["loss"]) for r in small.records(p, "step")] for p in (run, tmp_path / "whole")]
    assert told[0] == told[1]


def _steps(run: Path) -> int:
    try:
        return max((json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()), default=0)
    except (OSError, ValueError):
        return 0
