"""Kills random ranks of runs at random moments; torchrun's own launcher starts all ranks again.

    python tools/chaos.py [--kills 50] [--seed 0] [--kinds ddp modules] [--forked] [--out tools/tables/chaos.md [--append]]

Two ranks train a small network through phases of supervise, drop and freeze, with a checkpoint after each step. One of them gets SIGKILL:
while it starts, or a random time after a random number of steps. When a run has ended the next begins, until there were enough kills of
each of the `--kinds` of run: ddp, also with loader processes, fsdp with checkpoints in parts, also written while training goes on, modules.
Every run must end as the one of its kind that nobody disturbed: the same bits in every checkpoint, the same metrics, each sample once per
epoch.
`--forked` forks ranks from a process that has loaded torch, where torchrun starts the command: that is faster.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parent))

import chaos_run
import small_run
from crash_points import work_folder
from machine import heading
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from graphopt.train.ledger import check_ledger

#: steps that ranks take before they are killed, at most; on average they take half as many
MOST_STEPS = 6
STARTING = "before a step"
_Agent: Any = LocalElasticAgent


@dataclass
class Kill:
    """A rank that was killed."""

    rank: int
    seconds: float  # since its start
    where: str  # the run's phase, or STARTING
    kind: str  # of run


@dataclass
class Killer:
    """Kills one rank each time that ranks have been started, until `left` is 0; `draw` says whom and when."""

    left: int
    draw: random.Random
    kind: str
    folder: Path = Path()  # of the run
    kills: list[Kill] = field(default_factory=list)
    started: int = 0  # how often ranks were started, or ended by themselves
    start: float = 1.0  # seconds from the start of the ranks to their first checkpoint, as seen last
    step: float = 0.1  # seconds from one checkpoint to the next

    def begin(self, pids: dict[int, int]) -> None:
        """Ranks have been started: their processes by number."""
        self.started += 1
        if self.left:
            threading.Thread(target=self._kill, args=(pids, self.started), daemon=True).start()

    def _kill(self, pids: dict[int, int], started: int) -> None:
        victim, steps, part = self.draw.randrange(len(pids)), self.draw.randrange(MOST_STEPS + 1), self.draw.random()
        began, checkpoints, last = time.monotonic(), list[float](), self._saved()
        end = began + part * self.start if not steps else float("inf")
        while (now := time.monotonic()) < end:
            if self.started != started:
                return  # the run has ended, or another rank has failed by itself
            if (saved := self._saved()) != last:
                last = saved
                checkpoints.append(now)
                if len(checkpoints) == steps:
                    self.start = checkpoints[0] - began
                    self.step = (now - checkpoints[0]) / (steps - 1) if steps > 1 else self.step
                    end = now + part * self.step
            time.sleep(0.001)
        if self.folder.with_name(chaos_run.ENDED).exists():
            return
        with suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGKILL)
            self.left -= 1
            self.kills.append(Kill(victim, now - began, self._phase() if checkpoints else STARTING, self.kind))

    def _saved(self) -> int | None:
        """Another number for each checkpoint."""
        with suppress(FileNotFoundError):
            return (self.folder / "last.pt").stat().st_mtime_ns
        return None

    def _phase(self) -> str:
        """The phase that the run's last whole record names."""
        found = 0
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                found = json.loads(line).get("phase", found)
        return f"phase {found}"


def launch(folder: Path, killer: Killer, *, forked: bool) -> None:
    """Trains the run into `folder / "run"` on all ranks, as torchrun does it; `killer` disturbs them."""
    killer.folder = folder / "run"
    folder.mkdir()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch."):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # of each rank that has ended
    start_workers = _Agent._start_workers

    def started(agent: Any, group: Any) -> dict[int, Any]:
        found: dict[int, Any] = start_workers(agent, group)
        killer.begin(agent._pcontext.pids())
        return found

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=chaos_run.RANKS,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=killer.left,  # for nothing but kills
        monitor_interval=0.02,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )

    _Agent._start_workers = started
    try:
        if forked:
            elastic_launch(config, chaos_run.rank)(str(folder / "run"), killer.kind)
        else:
            (folder / "spec.toml").write_text(chaos_run.KINDS[killer.kind])
            command = ("-m", "graphopt", "train", str(folder / "spec.toml"), "--out", str(folder / "run"), "--trust", "--quiet")
            elastic_launch(config, sys.executable)(*command)
    finally:
        killer.started += 1
        _Agent._start_workers = start_workers


def disturb(folder: Path, killer: Killer, *, forked: bool) -> Iterator[tuple[int, list[str]]]:
    """Kills ranks in one run after another; yields of each how many were killed, and what is not as in the undisturbed one."""
    launch(folder / "whole", Killer(0, killer.draw, killer.kind), forked=forked)
    expected = small_run.result(folder / "whole" / "run")
    shutil.rmtree(folder / "whole")
    while killer.left:
        before = len(killer.kills)
        launch(folder / "disturbed", killer, forked=forked)
        run = folder / "disturbed" / "run"
        epochs = check_ledger(run / "ledger.bin", chaos_run.STEPS)
        wrong = small_run.differences(run, expected) + [str(epoch) for epoch in epochs if not epoch.right]
        shutil.rmtree(folder / "disturbed")
        yield len(killer.kills) - before, wrong


def table(kills: Sequence[Kill]) -> list[str]:
    """Markdown: the kind of run, where it was, and which rank was killed."""
    found = Counter((kill.kind, kill.where, kill.rank) for kill in kills)
    lines = [f"| run | where it was | {' | '.join(f'rank {rank} killed' for rank in range(chaos_run.RANKS))} |"]
    lines.append("|---" * (chaos_run.RANKS + 2) + "|")
    for kind, where in sorted({(kill.kind, kill.where) for kill in kills}):
        lines.append(f"| {kind} | {where} | {' | '.join(str(found[kind, where, rank]) for rank in range(chaos_run.RANKS))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each kind of run")
    parser.add_argument("--kinds", nargs="+", choices=chaos_run.KINDS, default=list(chaos_run.KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--append", action="store_true", help="behind the tables that are there")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    kills, outcomes, draw = list[Kill](), list[list[str]](), random.Random(options.seed)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for all processes
    os.environ["CHAOS_KINDS"] = json.dumps(options.kinds)
    get_context("forkserver").set_forkserver_preload(["chaos_forked"])
    with work_folder() as folder:
        for kind in options.kinds:
            killer = Killer(options.kills, draw, kind)
            for count, wrong in disturb(Path(folder), killer, forked=options.forked):
                outcomes.append(wrong)
                print(f"{kind}, run {len(outcomes)}, {count} kills: {'; '.join(wrong) or 'ends as undisturbed'}", flush=True)
            kills += killer.kills
    right = sum(not wrong for wrong in outcomes)
    about = f"Seed {options.seed}, {len(kills)} kills: {right} of {len(outcomes)} runs end as the undisturbed one, with exact ledgers."
    text = "\n".join([heading("Ranks killed", (__doc__ or "").partition("\n")[0]), about, "", *table(kills)])
    print(text)
    if options.out:
        before = options.out.read_text() + "\n" if options.append and options.out.exists() else ""
        options.out.write_text(before + text + "\n")
    return int(right < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
