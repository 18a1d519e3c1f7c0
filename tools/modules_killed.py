"""Kills each rank of a chain at each step of a run, which then goes on with as many ranks, with fewer, and in one process.

    python tools/modules_killed.py [--out tools/tables/modules_killed.md]

Three ranks train a network of four gradient-isolated modules for two epochs of three steps, with a checkpoint after every second step; in
the second epoch a block is frozen and ranks have other modules. One rank gets SIGKILL: before a step, when it has handed on what its
modules have computed and has not updated them, or as ranks hand in their parts of a checkpoint. The others must end by themselves. From
what is left on disk the run goes on, and every bit must be as in the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import modules_equal
import small_run
from machine import heading

from graphopt import Plan
from graphopt.passes.freeze import Freeze
from graphopt.train.modules import Modular
from graphopt.train.phase import Phase

RANKS = 3
EPOCHS, STEPS_OF_EPOCH = 2, 3
STEPS = EPOCHS * STEPS_OF_EPOCH
RESUMED = (3, 2, 1)
MOMENTS = BEFORE, HANDED_ON, CHECKPOINT = "before the step", "after handing on", "in a checkpoint"
CASE = modules_equal.Case(
    small_run.backbone,
    (modules_equal.CUTS, Freeze(select="stem", when={"epoch": 1})),
    {"epochs": EPOCHS, "ema": 0.9, "checkpoint_steps": 2, "optimizer": modules_equal.ADAMW},
    modules_equal.GRAY,
)


class Kill(NamedTuple):
    """Which rank dies, at which step from 0, and when in it."""

    rank: int
    step: int
    moment: str


def every_kill() -> Iterator[Kill]:
    """Checkpoints are written after every second step, and at the end of an epoch."""
    for step, rank, moment in product(range(STEPS), range(RANKS), MOMENTS):
        if moment != CHECKPOINT or step % 2 or (step + 1) % STEPS_OF_EPOCH == 0:
            yield Kill(rank, step, moment)


def train(plan: Plan, folder: Path, kill: Kill | None = None) -> None:
    """Starts or continues the run, in every rank that calls it."""
    if kill is not None and int(os.environ["RANK"]) == kill.rank:
        _die(kill)
    if kill is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the others report that the connection broke
    modules_equal.run(plan, CASE, folder, "modules", STEPS, resume=True)


def _die(kill: Kill) -> None:
    """From now on, this process kills itself at that moment."""
    now = -1
    step, forward, gathered = Phase.step, Modular.forward, Modular.gathered

    def reached(moment: str) -> None:
        if (now, moment) == (kill.step, kill.moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(phase: Phase, batches: Any, done: int) -> Any:
        nonlocal now
        now = done
        reached(BEFORE)
        return step(phase, batches, done)

    def forwarding(*arguments: Any, **options: Any) -> Any:
        found = forward(*arguments, **options)
        reached(HANDED_ON)
        return found

    def gathering(*arguments: Any, **options: Any) -> Any:
        reached(CHECKPOINT)
        return gathered(*arguments, **options)

    for kind, name, function in ((Phase, "step", stepping), (Modular, "forward", forwarding), (Modular, "gathered", gathering)):
        setattr(kind, name, function)


def differing(plan: Plan, kill: Kill, folder: Path, undisturbed: dict[str, Any], resumed: Sequence[int]) -> dict[int, list[str]]:
    """Per number of ranks with which the run goes on after a kill, what is not as in the undisturbed run."""
    statuses = modules_equal.in_ranks(RANKS, train, plan, folder / "killed", kill)
    alive = [f"rank {rank} ended with {status}" for rank, status in enumerate(statuses) if status != (-9 if rank == kill.rank else 1)]
    found = {}
    for count in resumed:
        run = folder / str(count)
        if (folder / "killed").exists():  # a run that fails in its first step leaves nothing
            shutil.copytree(folder / "killed", run)
        statuses = modules_equal.in_ranks(count, train, plan, run)
        failed = [f"{count} ranks ended with {statuses}"] if any(statuses) else []
        found[count] = alive + (failed or modules_equal.differing(modules_equal.content(run), undisturbed))
    return found


def undisturbed(plan: Plan, folder: Path) -> dict[str, Any]:
    """What one process leaves that nobody kills."""
    if modules_equal.in_ranks(1, train, plan, folder) != [0]:
        raise RuntimeError("the undisturbed run has failed")
    return modules_equal.content(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    plan, right, kills = modules_equal.plan_of(CASE), Counter[tuple[int, str]](), list(every_kill())
    with tempfile.TemporaryDirectory() as folder:
        expected = undisturbed(plan, Path(folder) / "undisturbed")
        for kill in kills:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                wrong = differing(plan, kill, Path(own), expected, RESUMED)
            right[kill.rank, kill.moment] += not any(wrong.values())
            print(
                f"rank {kill.rank}, step {kill.step + 1}, {kill.moment}: {[*wrong.values()] if any(wrong.values()) else 'equal'}",
                flush=True,
            )
    lines = ["| killed |" + "".join(f" {moment} |" for moment in MOMENTS), "|---" * (1 + len(MOMENTS)) + "|"]
    for rank in range(RANKS):
        tried = Counter(kill.moment for kill in kills if kill.rank == rank)
        lines.append(f"| rank {rank} |" + "".join(f" {right[rank, moment]} of {tried[moment]} |" for moment in MOMENTS))
    about = f"Kills after which the run ended as the undisturbed one, three times: on {', '.join(map(str, RESUMED))} ranks."
    text = "\n".join([heading("Ranks of a chain killed", (__doc__ or "").partition("\n")[0]), about, "", *lines])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return int(sum(right.values()) < len(kills))


if __name__ == "__main__":
    sys.exit(main())
