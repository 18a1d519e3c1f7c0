"""The ratios that people wait for, in one row, and what has become worse since the row before.

    python tools/bench.py [--only start check ...] [--out tools/tables/bench.md]

Processor time, one thread; what is compared takes turns in one process, or is launched one after the other. Exits with status 1 if a
ratio is worse than that of the last row by more than a fifth.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
#: a ratio that is so many times worse is reported
TOLERANCE = 1.2


@dataclass(frozen=True)
class Ratio:
    """One column: what it says, how it is measured, and whether less is better."""

    about: str
    measure: Callable[[], float]
    less: bool = True


def child(*arguments: str, times: int = 1) -> float:
    """Processor seconds of a Python process with these arguments, its own processes counted; the median of several launches."""
    found = []
    for _ in range(times):
        before = _children()
        command, environment = [sys.executable, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        # A check reports data that is not here at its end, after all the work.
        if process.returncode and "error: data." not in process.stderr:
            raise SystemExit(f"{shlex.join(command)} ended with status {process.returncode}: {process.stderr}")
        found.append(_children() - before)
    return statistics.median(found)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start() -> float:
    return child("-m", "graphopt", "--version", times=3) / child("-c", "import typer, rich, pydantic", times=3)


def check(spec: str) -> float:
    return child("-m", "graphopt", "check", spec) / child("-c", "import torch", times=3)


def compiling(batch: int = 4) -> float:
    import torchvision
    from supervise_bench import Timed

    import graphopt
    from graphopt.passes.freeze import Freeze

    torch.manual_seed(0)
    model, shape = torchvision.models.resnet50(), (3, 224, 224)
    seconds = []
    for _ in range(2):
        began = time.process_time()
        graphopt.compile(model, Freeze(select=["conv1", "bn1", "layer1", "layer2"]), input=shape, verify="full")
        seconds.append(time.process_time() - began)
    timed = Timed(model, False, "cpu", False)
    steps = [timed.step(torch.randn(batch, *shape), torch.arange(batch)) for _ in range(4)]
    return min(seconds) / (statistics.median(steps[1:]) * 32 / batch)


def running() -> float:
    from runner_bench import CASES, ratios

    return statistics.median(ratios(next(iter(CASES)), 7, 8))


def loading() -> float:
    from loader_bench import ratio

    return ratio()


def growth() -> float:
    """The exponent e of time = nodes ** e, of all steps together."""
    from growth import measure

    measure("chain", 100)  # imports and first use
    (fewer, first), (more, last) = measure("chain", 1000), measure("chain", 4000)
    shared = first.keys() & last.keys()
    return math.log(sum(last[k] for k in shared) / sum(first[k] for k in shared)) / math.log(more / fewer)


def compiled() -> float:
    from compile_bench import ratio

    return ratio()


def supervising(rounds: int = 6) -> float:
    from supervise_bench import Apart, Timing, turns

    apart = {label: Apart("resnet110", label, Timing(batch=16)) for label in ("end-to-end", "K = 4")}
    seconds = turns({label: one.step for label, one in apart.items()}, rounds)
    for one in apart.values():
        one.close()
    return statistics.median(own / other for own, other in zip(seconds["K = 4"], seconds["end-to-end"], strict=True))


RATIOS = {
    "start": Ratio("`graphopt --version` over importing typer, rich and pydantic", start),
    "check": Ratio("`graphopt check learn_and_drop/resnet152` over importing torch", lambda: check("learn_and_drop/resnet152")),
    "check 2": Ratio("`graphopt check supervise/swin-t-k4` over importing torch", lambda: check("supervise/swin-t-k4")),
    "compile": Ratio("compile and full verification of ResNet-50, first half frozen, over its training step at batch 32", compiling),
    "growth": Ratio("exponent of the time of all steps by nodes (trace, passes, diff, layout), chains of 1,000 and 4,000", growth),
    "runner": Ratio("images/s of `graphopt train` over a loop written by hand, ResNet-20", running, less=False),
    "loader": Ratio("images/s of the loader over timm's, JPEGs of 500x375, random resized crops", loading, less=False),
    "compiled": Ratio("a compiled step over an eager one, ResNet-8", compiled),
    "supervise": Ratio("a step of four local modules over one end-to-end, ResNet-110", supervising),
}


def worse(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """One line for each ratio that is worse than before by more than a fifth."""
    lines = []
    for name in before.keys() & now.keys():
        factor = now[name] / before[name] if RATIOS[name].less else before[name] / now[name]
        if factor > TOLERANCE:
            lines.append(f"{name}: {before[name]:.3g} before, {now[name]:.3g} now ({RATIOS[name].about})")
    return sorted(lines)


def last_row(text: str) -> dict[str, float]:
    """The ratios of a table's last row, by the names in its head."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line.startswith("|")]
    if len(rows) < 3:
        return {}
    return {name: float(value) for name, value in zip(rows[0], rows[-1], strict=True) if name in RATIOS and value != "-"}


def head() -> str:
    about = (__doc__ or "").partition("\n")[0]
    columns = "\n".join(f"- {name}: {ratio.about}; {'less' if ratio.less else 'more'} is better" for name, ratio in RATIOS.items())
    names = ["date", "commit", "Python", "torch", *RATIOS]
    return f"# Bench\n\n{about} `make bench` appends a row.\n\n{columns}\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|\n"


def row(found: Mapping[str, float]) -> str:
    commit = _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    values = [f"{found[name]:.3f}" if name in found else "-" for name in RATIOS]
    cells = [str(datetime.date.today()), commit, platform.python_version(), torch.__version__.partition("+")[0], *values]
    return f"| {' | '.join(cells)} |\n"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--out", type=Path, help="append the row to this table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = options.out.read_text() if options.out and options.out.exists() else head()
    found: dict[str, float] = {}
    for name in options.only:
        found[name] = RATIOS[name].measure()
        print(f"{name}: {found[name]:.3f}  ({RATIOS[name].about})", flush=True)
    if options.out:
        options.out.write_text(text + row(found))
    lines = worse(last_row(text), found)
    print("\n".join(["worse than before by more than a fifth:", *lines] if lines else ["nothing is worse by more than a fifth"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
