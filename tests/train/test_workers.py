"""Loader processes: signals to the whole group, ends without a trace, and a killed trainer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import Pass, RunError
from graphopt.data.loader import Data, ImageFeed, open_data
from graphopt.passes.drop import Drop
from graphopt.spec import DataSpec
from graphopt.train import Stopped, train
from graphopt.train import preflight as runner
from graphopt.train.folder import RunFolder
from tests.support.ranks import run_process
from tests.train import small

DATA = small.DATA.model_copy(update={"workers": 2})
SETTINGS = small.settings(epochs=2)


def go(folder: Path, drop: bool = False, workers: int = 2, resume: bool = False) -> dict[str, torch.Tensor]:
    passes: list[Pass] = [Drop(upto="blocks.0", cache="disk", force=True)] if drop else []
    data = DATA.model_copy(update={"workers": workers})
    train(small.plan(passes, drop=0.0), folder, settings=SETTINGS, data=data, resume=resume)
    return small.weights(folder)


class At:
    """A transform that does something once, in the process that takes image `number`."""

    def __init__(self, transform: Callable[[Any], torch.Tensor], number: int, action: Callable[[], None], counter: Path) -> None:
        self.transform, self.number, self.action, self.counter = transform, number, action, counter

    def __call__(self, image: Any) -> torch.Tensor:
        with self.counter.open("ab") as file:  # shared by all processes
            file.write(b".")
            file.flush()
            if file.tell() == self.number:
                self.action()
        return self.transform(image)


def acting(part: str, number: int, action: Callable[[], None], counter: Path) -> Callable[..., Data]:
    """`open_data`, with something that happens at an image of one part, `train` or `evaluation`."""

    def opened(spec: DataSpec, *more: Any) -> Data:
        data = open_data(spec, *more)
        samples = getattr(data, part)
        samples.transform = At(samples.transform, number, action, counter)
        return data

    return opened


def disturbed(folder: Path, drop: bool, part: str, number: int, action: Callable[[], None]) -> None:
    """In a process and a group of its own: a run to which something happens. Prints into a file next to the folder."""
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    descriptor = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    runner.open_data = acting(part, number, action, folder.with_suffix(".count"))  # type: ignore[assignment]  # this process ends soon
    try:
        go(folder, drop)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


def disturb(*arguments: Any) -> int:
    """The exit status of `disturbed`."""
    return run_process(disturbed, *arguments)


class KillGroup:
    """What schedulers do."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        os.killpg(os.getpgid(0), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return {drop: go(folder / str(drop), drop, workers=0) for drop in (False, True)}


@pytest.mark.parametrize(
    ("number", "part", "image", "drop"),
    [
        (signal.SIGTERM, "train", 40, False),
        (signal.SIGINT, "train", 150, False),
        (signal.SIGTERM, "evaluation", 30, False),
        (signal.SIGTERM, "train", 50, True),
    ],
    ids=["first epoch", "Ctrl-C", "evaluation", "filling a cache"],
)
def test_a_signal_to_the_whole_group_stops_with_a_checkpoint(
    tmp_path: Path, whole: Any, number: int, part: str, image: int, drop: bool
) -> None:
    status = disturb(tmp_path / "run", drop, part, image, KillGroup(number))
    assert ((tmp_path / "run.log").read_text(), status) == ("", 128 + number)
    assert small.same(go(tmp_path / "run", drop, workers=0, resume=True), whole[drop])


@pytest.mark.parametrize("end", ["well", "unreadable", "stopped"])
def test_no_loader_process_outlives_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    def unreadable() -> None:
        raise OSError("broken")

    parent = os.getpid()
    actions = {"well": int, "unreadable": unreadable, "stopped": lambda: os.kill(parent, signal.SIGTERM)}
    monkeypatch.setattr(runner, "open_data", acting("train", 40, actions[end], tmp_path / "count"))
    caught: BaseException | None = None
    try:
        go(tmp_path / "run")
    except (RunError, OSError) as error:
        caught = error
    assert (caught is None, isinstance(caught, Stopped)) == (end == "well", end == "stopped")
    assert not multiprocessing.active_children()


def leave_open(log: Path) -> None:
    """Takes one batch, and keeps the feed in a module."""
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that torch waits for a loader's process; else 5
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    feed = ImageFeed(open_data(DataSpec(name="digits"), (3, 8, 8), 0).train, 16, workers=1)
    runner.left_open = batches = feed.batches(0)  # type: ignore[attr-defined]  # a name that outlives this function
    next(batches)


def test_a_feed_that_is_left_open_does_not_keep_the_interpreter(tmp_path: Path) -> None:
    assert run_process(leave_open, tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == ""


class KillParent:
    """Kills the trainer, and does not end itself."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        self.file.write_text(str(os.getpid()))
        time.sleep(60)


def test_a_run_whose_trainer_was_killed_is_resumed_at_once(tmp_path: Path, whole: Any) -> None:
    survivor = tmp_path / "survivor"
    assert disturb(tmp_path / "run", False, "train", 150, KillParent(survivor)) == -signal.SIGKILL
    while not survivor.exists() or not survivor.read_text():
        time.sleep(0.001)
    worker = int(survivor.read_text())
    os.kill(worker, 0)
    RunFolder.claim(tmp_path / "run", small.plan(drop=0.0).digest, resume=True).release()
    os.kill(worker, signal.SIGKILL)
    assert small.same(go(tmp_path / "run", resume=True), whole[False])
