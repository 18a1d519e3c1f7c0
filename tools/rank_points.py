"""Kills one of two ranks at each system call by which it saves its parts of a checkpoint, and lets both go on from what is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import chaos_run
import crash_points
import small_run
import system_calls
import torch
from system_calls import Call
from tqdm import tqdm

RANKS = 2
#: three steps with a checkpoint in parts after each
SPEC = (
    small_run.SPEC[: small_run.SPEC.index("[[pass]]")]
    + '[[pass]]\nuse = "supervise"\ncuts = ["two"]\ndecoder = "none"\n'
    + chaos_run.KINDS["fsdp, in parts"][chaos_run.SPEC.index("[data]") :].replace("epochs = 6", "epochs = 1")
)
#: the save that is disturbed: there is a checkpoint before it, and a step after it
SAVE, NEXT = "parts/step-00000002", "parts/step-00000003"
#: seconds that ranks may take, and that one whose peer was killed may take to notice it
SECONDS, PATIENCE = 60, 20


class RankPoint(NamedTuple):
    """Which rank is killed, and where, as in `crash_points`."""

    rank: int
    point: crash_points.Point


class Ranks:
    """The run on two ranks, which are forked from this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[list[str]]()
        self.run = small_run.SmallRun(SPEC)
        self.run.plan = replace(self.run.plan, measure=None)  # forecasts would take most of a short run's time
        for watched in range(RANKS):
            root, seen = folder / f"whole-{watched}", list[str]()
            statuses = self.sit(root, watched, crash_points.noting(seen))
            if any(statuses):
                raise RuntimeError(f"the undisturbed ranks ended with {statuses}")
            self.calls.append(seen)
        self.expected: Mapping[str, Any] = small_run.result(root)

    def points(self) -> Iterator[RankPoint]:
        """Before each call of the save, and in the middle of each write."""
        for rank, calls in enumerate(self.calls):
            first, last = (next((n for n, call in enumerate(calls) if name in call), len(calls)) for name in (SAVE, NEXT))
            seen = Counter[str]()
            for number, call in enumerate(map(crash_points.plain, calls)):
                if first <= number < last:
                    halves = (False, True) if call.split()[0] in crash_points.WRITES else (False,)
                    yield from (RankPoint(rank, (call, seen[call], half)) for half in halves)
                seen[call] += 1

    def check(self, point: RankPoint) -> list[str]:
        """Kills a rank at a point, and starts both again; what is then not as in the undisturbed run."""
        root = self.folder / "killed"
        shutil.rmtree(root, ignore_errors=True)
        statuses = self.sit(root, point.rank, crash_points.killing(point.point))
        if statuses[point.rank] != signal.SIGKILL:
            return [f"rank {point.rank} was not killed: status {statuses[point.rank]}"]
        if statuses[1 - point.rank] in (0, signal.SIGKILL):
            return [f"the other rank ended with status {statuses[1 - point.rank]}"]
        statuses = self.sit(root)
        return [f"the ranks that go on ended with {statuses}"] if any(statuses) else small_run.differences(root, self.expected)

    def sit(self, root: Path, watched: int | None = None, decide: Callable[[int, Call], int] = lambda *_: 0) -> list[int]:
        """Both ranks, from the start or from what is there; their statuses. `decide` is asked before each call of the watched one."""
        root.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        rank = partial(self._rank, root, port)
        forked = {number: _forked(partial(rank, number)) for number in range(RANKS) if number != watched}
        statuses = {watched: system_calls.watch(partial(rank, watched), root, decide)} if watched is not None else {}
        patience = PATIENCE if any(statuses.values()) else SECONDS
        statuses |= {number: _ended(process, patience) for number, process in forked.items()}
        return [statuses[number] for number in range(RANKS)]

    def _rank(self, root: Path, port: int, number: int) -> None:
        signal.alarm(SECONDS)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(RANKS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the other one reports that the connection broke
        torch.set_num_threads(1)
        tqdm.set_lock(RLock())  # forked ranks share it; one that is killed would never give it back
        os.chdir(root)
        self.run.train(Path("run"))


def _forked(function: Callable[[], None]) -> int:
    """Calls a function in a forked process, whose status is 1 if it raises; the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function()
        status = 0
    finally:
        os._exit(status)  # whoever forked must not go on twice


def _ended(process: int, seconds: float) -> int:
    """The status of a process, which is killed if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def table(calls: Sequence[Sequence[str]], found: Mapping[RankPoint, list[str]]) -> list[str]:
    """Markdown: what was tried of each rank, and how it ended."""
    lines = ["| the rank that is killed | its calls, in all | killed before one | in the middle of a write | ends bit-equal | does not |"]
    lines.append("|---" * 6 + "|")
    for rank, all_calls in enumerate(calls):
        mine = {point: wrong for point, wrong in found.items() if point.rank == rank}
        halves, wrong = sum(point.point[2] for point in mine), sum(map(bool, mine.values()))
        lines.append(f"| {rank} | {len(all_calls)} | {len(mine) - halves} | {halves} | {len(mine) - wrong} | {wrong} |")
    return lines
