"""Kills a training run before and after each system call that changes a folder, and in the middle of each write, and resumes it."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import small_run
import system_calls
import torch
from parts_run import PartsRun
from system_calls import Call

from graphopt.train import Stopped

#: files of somebody else, and the file of the run next to which they appear once it is there
FOREIGN = {
    "run/notes.txt": "run/run.json",
    "run/.hidden": "run/run.json",
    "run/.last.pt.of-somebody-else": "run/run.json",
    "run/mine/epoch-0001.pt": "run/run.json",
    "run/features/notes.txt": "run/features/features.json",
}
LEFTOVERS = ("run/.last.pt.ab12_x9z", "run/.epoch-0003.pt.link", "run/.spec.toml.12345678")
SECONDS = 120
#: points that are visited in one sitting
TOGETHER = 100
WRITES = {"write", "pwrite64"}
#: a call, how many like it come before, and whether in its middle (some take one write more or less: times have more digits or fewer)
Point = tuple[str, int, bool]


@dataclass
class Scenario:
    """One sitting of a run, which is killed: from a folder in some state to the end, or to a stop on request.

    Attributes:
        stop: before the first call that it matches, the run is asked to stop by SIGTERM.
        prepare: brings the folder into the state in which the sitting begins.
    """

    name: str
    run: small_run.SmallRun | PartsRun
    prepare: Callable[[Path], None] = lambda _: None
    stop: str | None = None
    start: Path = field(init=False)
    expected: Mapping[str, Any] = field(init=False)
    calls: list[str] = field(init=False)

    def enumerate(self, folder: Path) -> None:
        """Makes the first state, counts the calls of the undisturbed sitting, and goes on to the end."""
        self.start = folder / self.name.replace(" ", "-")
        self.start.mkdir()
        self.prepare(self.start)
        root = copied(self.start, folder / "whole")
        self.calls = []
        self.sit(root, noting(self.calls))
        _resume(self.run, root)
        self.expected = small_run.result(root)
        shutil.rmtree(root)

    def sit(self, root: Path, decide: Callable[[int, Call], int], seconds: int = SECONDS) -> int:
        """The sitting, which may take so many seconds (0: any); returns the process' status."""
        asked = False

        def decided(number: int, call: Call) -> int:
            nonlocal asked
            sent = decide(number, call)
            if not asked and not sent and self.stop is not None and re.search(self.stop, str(call)):
                asked, sent = True, signal.SIGTERM
            return sent

        return system_calls.watch(partial(_train, self.run, root, seconds), root, decided)

    def points(self) -> list[Point]:
        """Where to kill: before each call (after the one before it), after the last, and in the middle of each write."""
        seen, found = Counter[str](), []
        for call in map(plain, self.calls):
            found += [(call, seen[call], half) for half in (False, True) if not half or call.split()[0] in WRITES]
            seen[call] += 1
        return [*found, ("the end", 0, False)]

    def kill(self, root: Path, point: Point) -> None:
        """Brings `root` to the first state, and kills the sitting at a point."""
        copied(self.start, root)
        self.sit(root, killing(point))

    def check(self, root: Path, point: Point) -> list[str]:
        """Kills the sitting at a point, and resumes; what is then not as in the undisturbed run."""
        self.kill(root, point)
        return self._finish(root)

    def visit(self, root: Path, chosen: Collection[Point]) -> dict[Point, list[str]]:
        """`check` of many points in one sitting, which waits at each: what SIGKILL would leave is copied, and the run resumed there.

        Points that leave the same files are resumed once.
        """
        copied(self.start, root)
        left, seen = root.with_name(f"{root.name}-left"), Counter[str]()
        found, known = dict[Point, list[str]](), dict[str, list[str]]()

        def look(point: Point, halved: Call | None = None) -> None:
            if point not in chosen:
                return
            copied(root, left)
            if halved is not None:
                halved.do_half(left)
            state = _content(left)
            if state not in known:
                known[state] = self._finish(left)
            found[point] = known[state]

        def decide(_: int, call: Call) -> int:
            text = plain(str(call))
            look((text, seen[text], False))
            if call.name in WRITES:
                look((text, seen[text], True), call)
            seen[text] += 1
            return 0

        self.sit(root, decide, seconds=0)
        for point in set(chosen) - found.keys():  # the end; and calls that did not come this time
            look(point)
        return found

    def _finish(self, root: Path) -> list[str]:
        """Resumes what a killed sitting has left, next to files of others; what is then not as in the undisturbed run."""
        foreign = [name for name, own in FOREIGN.items() if (root / own).exists()]
        for name in foreign:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(name)
        fault = _resume(self.run, root)
        if fault is not None:
            return [fault]
        gone = [f"removed: {name}" for name in foreign if not (root / name).exists() or (root / name).read_text() != name]
        for name in foreign:
            (root / name).unlink(missing_ok=True)
        return gone + small_run.differences(root, self.expected)


def noting(calls: list[str]) -> Callable[[int, Call], int]:
    """What to decide of each call, so that all are made, and noted."""

    def decide(_: int, call: Call) -> int:
        calls.append(str(call))
        return 0

    return decide


def killing(point: Point) -> Callable[[int, Call], int]:
    """What to decide of each call, so that the process is killed at a point."""
    call, left, half = point

    def decide(_: int, now: Call) -> int:
        nonlocal left
        if plain(str(now)) != call:
            return 0
        left -= 1
        if left >= 0:
            return 0
        if half:
            now.do_half()
        return signal.SIGKILL

    return decide


def plain(call: str) -> str:
    """A call without what is drawn at random."""
    return re.sub(r"(/\.[\w.-]+)\.[a-z0-9_]{8}(?= |$)", r"\1.*", call)


def _content(root: Path) -> str:
    """A digest of all files under a folder: their names, without what is drawn at random, modes, links and bytes, but not their times."""
    digest, names = hashlib.blake2b(), dict[int, str]()
    for path in sorted(root.rglob("*"), key=lambda path: plain(str(path))):
        name, status = plain(str(path.relative_to(root))), path.lstat()
        first = names.setdefault(status.st_ino, name)
        content = path.read_bytes() if path.is_file() else b""
        digest.update(repr((name, first, status.st_mode, len(content))).encode() + content)
    return digest.hexdigest()


def _train(run: small_run.SmallRun | PartsRun, root: Path, seconds: int = SECONDS) -> None:
    signal.alarm(seconds)
    torch.set_num_threads(1)  # a forked process makes its pool of threads here, not in two threads of autograd at once
    os.chdir(root)
    with contextlib.suppress(Stopped):
        run.train(Path("run"))


def _resume(run: small_run.SmallRun | PartsRun, root: Path) -> str | None:
    """Goes on to the end, in a process of its own; returns what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            _train(run, root)
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    status = os.waitpid(child, 0)[1]
    return text or (f"the resumed run ended with status {status}" if status else None)


def copied(source: Path, target: Path) -> Path:
    """A copy with the same times and links."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


# -- the sittings ----------------------------------------------------------------------------------------------------------------
SECOND_FILL = r"^pwrite64 .*\.part$"
SHORT = small_run.SPEC.replace("epochs = 4", "epochs = 2").replace("checkpoint_steps = 3", "")
SHARED = small_run.SPEC.replace('cache = "disk"', 'cache = "disk"\nfolder = "kept"').replace("keep = 4", "keep = 1")


def scenarios() -> Iterator[Scenario]:
    """The sittings that are killed."""
    plain = small_run.SmallRun()

    def at_second_fill(root: Path) -> None:
        """The first cut's features are whole, the second cut's are about to be made."""
        fills: list[str] = []

        def decide(_: int, call: Call) -> int:
            if call.name == "fallocate":
                fills.append(str(call))
            return signal.SIGKILL if len(fills) == 2 else 0

        system_calls.watch(partial(_train, plain, root), root, decide)

    def damaged(root: Path) -> None:
        """Stopped while the second cut is filled; then the last checkpoint was cut short, and there are leftovers."""
        at_second_fill(root)
        stopping.sit(root, lambda *_: 0)
        content = (root / "run" / "last.pt").read_bytes()
        (root / "run" / "last.pt").unlink()
        (root / "run" / "last.pt").write_bytes(content[: len(content) // 2])
        for name in LEFTOVERS:
            (root / name).write_text("x")

    stopping = Scenario("stopped while features are computed", plain, at_second_fill, stop=SECOND_FILL)
    yield Scenario("from the start", plain)
    yield stopping
    yield Scenario("resumed over a damaged checkpoint", plain, damaged)
    yield Scenario("features in a folder of their own, one checkpoint", small_run.SmallRun(SHARED))
    yield Scenario("with TensorBoard", small_run.SmallRun(SHORT, tensorboard=True))


def in_parts() -> Iterator[Scenario]:
    """Nothing but three checkpoints in parts, one over the other; and the same, resumed from the first."""

    def first(root: Path) -> None:
        system_calls.watch(partial(_train, PartsRun(last=3), root), root, lambda *_: 0)

    yield Scenario("three checkpoints in parts", PartsRun())
    yield Scenario("two more, resumed", PartsRun(), first)


_known: list[Scenario] = []


def prepared(folder: Path, count: int | None = None, among: Callable[[], Iterator[Scenario]] = scenarios) -> list[Scenario]:
    """The scenarios, or the first `count`, with their calls counted; `folder` holds their states."""
    _known[:] = islice(among(), count)
    for scenario in _known:
        scenario.enumerate(folder)
    return _known


def check_points(folder: Path, points: Sequence[tuple[int, Point]], jobs: int = 1) -> Iterator[tuple[tuple[int, Point], list[str]]]:
    """Kills at each point of a scenario, which has a number, and yields what is wrong."""
    if jobs == 1:
        yield from map(partial(_check, folder), points)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(partial(_check, folder), points)


def visit_points(folder: Path, points: Sequence[tuple[int, Point]], jobs: int = 1) -> Iterator[tuple[tuple[int, Point], list[str]]]:
    """As `check_points`, with several points in one sitting."""
    of = {index: [point for number, point in points if number == index] for index in dict.fromkeys(index for index, _ in points)}
    tasks = [(index, mine[first : first + TOGETHER]) for index, mine in of.items() for first in range(0, len(mine), TOGETHER)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for index, found in pool.imap_unordered(partial(_visit, folder), tasks):
            yield from (((index, point), wrong) for point, wrong in found.items())


def _visit(folder: Path, task: tuple[int, list[Point]]) -> tuple[int, dict[Point, list[str]]]:
    return task[0], _known[task[0]].visit(folder / f"sitting-{os.getpid()}", task[1])


def _check(folder: Path, task: tuple[int, Point]) -> tuple[tuple[int, Point], list[str]]:
    return task, _known[task[0]].check(folder / f"point-{os.getpid()}", task[1])


def work_folder() -> tempfile.TemporaryDirectory[str]:
    """Where the runs lie: in memory, where there is such a folder."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def table(found: Mapping[tuple[int, Point], list[str]]) -> list[str]:
    """Markdown: what was tried of each scenario, and how it ended."""
    lines = ["| the run that is killed | calls | killed before or after one | in the middle of a write | ends bit-equal | does not |"]
    lines.append("|---" * 6 + "|")
    for index, scenario in enumerate(_known):
        mine = {point: wrong for point, wrong in found.items() if point[0] == index}
        halves, wrong = sum(point[2] for _, point in mine), sum(map(bool, mine.values()))
        counts = (len(scenario.calls), len(mine) - halves, halves, len(mine) - wrong, wrong)
        lines.append(f"| {scenario.name} | {' | '.join(map(str, counts))} |")
    names = Counter(call.split()[0] for scenario in _known for call in scenario.calls)
    return [*lines, "", f"The calls: {', '.join(f'{count} {name}' for name, count in names.most_common())}."]
