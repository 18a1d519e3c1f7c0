"""The runs of a study, each in a process of its own: what is done stays, what is missing is trained, what fails stops nothing else."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import GraphoptError, RunError
from graphopt.files import lock_folder, read_text, reason, sealed, unlock_folder, unsealed, write_atomically
from graphopt.spec import dumps, loads
from graphopt.studies.study import Member, Study
from graphopt.units import show_time

INDEX = "study.json"
INDEX_VERSION = 2
#: seconds that a run waits for another process to leave its folder
PATIENCE = 30


@dataclass(frozen=True)
class Outcome:
    """What became of one run; `message` says what went wrong, or its accuracy and time."""

    member: Member
    folder: Path
    state: Literal["done", "failed", "stopped"]
    message: str


@dataclass
class _Running:
    """A run in its process."""

    member: Member
    folder: Path
    slot: int
    process: Any
    started: float


def folder_of(member: Member, out: Path) -> Path:
    """Where a run is, or will be: one that was made under another name of its row is found by its identity."""
    known = sorted(path for path in out.glob(f"*-{member.identity[:8]}") if path.is_dir())
    return known[0] if known else out / member.folder


def summary_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run has written; None for one that is not finished."""
    try:
        return unsealed(read_text(folder / "summary.json"))
    except (OSError, ValueError):
        return None


def _write_index(study: Study, members: Sequence[Member], out: Path) -> None:
    """Writes which runs belong to the study, whose folder is locked: `graphopt compare` reads it."""
    runs = [{"folder": folder_of(m, out).name, "row": m.row, "seed": m.seed, "identity": m.identity, "set": m.changes} for m in members]
    about = {"study": INDEX_VERSION, "name": study.name, "baselines": {m.row: m.baseline or members[0].row for m in members}}
    published = [{**item.model_dump(), "variant": row} for item in study.published for row in item.variant]
    record = {**about, "published": published, "runs": runs}
    write_atomically(out / INDEX, sealed(json.loads(json.dumps(record)), indent=2) + "\n")


def run_study(
    study: Study,
    members: Sequence[Member],
    out: Path,
    *,
    only: Sequence[Member] | None = None,
    jobs: int = 1,
    devices: Sequence[str] = (),
    trust: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Trains what is missing of a study's runs into folders in `out`, `jobs` at a time, and says how each ended.

    Ctrl-C and SIGTERM stop the runs after their step, with checkpoints; the next call continues them. Raises RunError if another process
    is at work in the folder, of which nothing changes then, or if there can be no such folder.

    Args:
        only: those of the members that are trained now; default: all.
        devices: `train.device` of the runs, in turn; default: what their specs say.
    """
    from graphopt.train.signals import StopSignals

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
    except BlockingIOError as error:
        raise RunError("another process is running a study in this folder", where=str(out)) from error
    except OSError as error:
        raise RunError(f"cannot be an output folder: {reason(error)}", where=str(out), fix="Choose another") from error
    chosen = members if only is None else only
    outcomes, pending = [], []
    for member in chosen:
        folder = folder_of(member, out)
        done = summary_of(folder)
        if done is not None:
            outcomes.append(Outcome(member, folder, "done", _result(done)))
        else:
            pending.append((member, folder))
    say(f"{len(chosen)} runs: {len(outcomes)} done, {len(pending)} to train")
    try:
        _write_index(study, members, out)
        with StopSignals() as signals:
            outcomes += _Pool(pending, jobs, devices, trust, say, lambda: signals.signum or 0).run()
    finally:
        unlock_folder(lock)
    order = {member.identity: number for number, member in enumerate(chosen)}
    return sorted(outcomes, key=lambda outcome: order[outcome.member.identity])


class _Pool:
    """Starts runs while there is room, and waits for them."""

    def __init__(
        self,
        pending: Sequence[tuple[Member, Path]],
        jobs: int,
        devices: Sequence[str],
        trust: bool,
        say: Callable[[str], None],
        signum: Callable[[], int],
    ) -> None:
        self.pending, self.total = list(pending), len(pending)
        self.jobs, self.devices, self.trust, self.say, self.signum = jobs, devices, trust, say, signum
        self.running: list[_Running] = []
        self.outcomes: list[Outcome] = []
        # A server that has loaded the libraries, and done nothing else, is forked: a fork of a process that has trained cannot train.
        self.context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self.context.set_forkserver_preload(["graphopt.train", __name__])
        # The system closes the writing end however this process ends, and no other process has it: runs learn of it at the other end.
        self.alive, self._held = self.context.Pipe(duplex=False)

    def run(self) -> list[Outcome]:
        told = False
        try:
            while self.running or (self.pending and not self.signum()):
                while self.pending and len(self.running) < self.jobs and not self.signum():
                    self._start(*self.pending.pop(0))
                wait([item.process.sentinel for item in self.running], timeout=0.2)
                if self.signum() and not told:
                    told = True
                    self.say(f"stopping: {len(self.running)} runs write checkpoints")
                    for item in self.running:
                        os.kill(item.process.pid, self.signum())
                for item in [item for item in self.running if item.process.exitcode is not None]:
                    self._end(item)
        finally:
            for item in self.running:  # on a second signal, or an error
                item.process.kill()
            self.alive.close()
            self._held.close()
        return self.outcomes + [Outcome(member, folder, "stopped", "not begun") for member, folder in self.pending]

    def _start(self, member: Member, folder: Path) -> None:
        used = {item.slot for item in self.running}
        slot = next(number for number in range(self.jobs) if number not in used)
        device = self.devices[slot % len(self.devices)] if self.devices else None
        arguments = (dumps(member.spec), str(folder), device, self.jobs, self.trust, self.alive)
        process = self.context.Process(target=_train, args=arguments)
        process.start()
        self.running.append(_Running(member, folder, slot, process, time.perf_counter()))

    def _end(self, item: _Running) -> None:
        self.running.remove(item)
        code, done = item.process.exitcode, summary_of(item.folder)
        if code == 0 and done is not None:
            outcome = Outcome(item.member, item.folder, "done", _result(done))
        elif self.signum() and (code in (128 + self.signum(), -self.signum()) or _error(item.folder) is None):
            outcome = Outcome(item.member, item.folder, "stopped", "stopped; the same command continues it")
        else:
            outcome = Outcome(item.member, item.folder, "failed", _why(item.folder, code))
        self.outcomes.append(outcome)
        self.say(f"{len(self.outcomes)}/{self.total} {item.member.row}, seed {item.member.seed}: {outcome.message}")


def _result(summary: dict[str, Any]) -> str:
    return f"accuracy {100 * summary['accuracy']:.2f} %, {show_time(summary['seconds'])}"


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _why(folder: Path, code: int) -> str:
    """The error that a run's log ends with."""
    if code < 0:
        return f"ended by signal {-code} (no memory?); its log: {_log(folder)}"
    return _error(folder) or f"ended with status {code}; its log: {_log(folder)}"


def _error(folder: Path) -> str | None:
    """The last error in a run's log. None: there is none, as of a process that was interrupted before it had begun."""
    try:
        lines = _log(folder).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)


def _train(text: str, folder: str, device: str | None, jobs: int, trust: bool, alive: Connection) -> None:
    """One run, in a process of its own; all that it says goes to its log. Its exit status is as that of `graphopt train`.

    It stops, after its step, when the other end of `alive` is closed: when the study has been killed.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C reaches the study alone, which tells its runs once
    import torch
    from rich.console import Console

    from graphopt.train import train

    with _log(Path(folder)).open("a", encoding="utf-8", buffering=1) as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        threading.Thread(target=_stop_without, args=(alive,), daemon=True).start()
        if jobs > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
        overrides = [f"train.device={json.dumps(device)}"] if device is not None else []
        try:
            _await(Path(folder))
            train(loads(text, trust=trust, overrides=overrides), folder, resume=True, trust=trust, console=Console(file=log, width=140))
        except GraphoptError as error:
            print(f"error: {error}", file=log)
            sys.exit(error.exit_code)
        except Exception as error:
            print(f"{traceback.format_exc()}\nerror: {type(error).__name__}: {error}", file=log)
            sys.exit(1)


def _stop_without(alive: Connection) -> None:
    """Stops this process, after its step, when the study is gone."""
    with suppress(EOFError, OSError):
        alive.recv()
    os.kill(os.getpid(), signal.SIGTERM)


def _await(folder: Path) -> None:
    """Waits while a run of a study that was killed writes its checkpoint; not for ever: somebody else may train there."""
    end = time.monotonic() + PATIENCE
    while folder.is_dir() and time.monotonic() < end:
        try:
            unlock_folder(lock_folder(folder))
            return
        except BlockingIOError:
            time.sleep(0.05)
