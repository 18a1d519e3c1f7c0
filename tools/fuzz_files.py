"""Kills runs at every system call that changes their folder, and flips bits of every file that is read.

    python tools/fuzz_files.py [--part crashes | parts | ranks | flips] [--flips 10000] [--jobs 2] [--out tools/tables/fuzz_files.md]

Crash points are enumerated: an undisturbed run counts its system calls; it may be killed before each of them (so after the call before),
and in the middle of each write. From what is left a run is resumed, and must end with the same bits in every checkpoint, the same metrics
and summary, no file of its own left over and none of somebody else's removed. `--every n` takes each n-th point only.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bit_flips
import crash_points
import rank_points
import torch
from machine import heading

PARTS = {
    "crashes": "Killed",
    "parts": "Killed while it saves in parts",
    "ranks": "One of two ranks killed while they save in parts",
    "flips": "Damaged",
}


_OTHER = "Other data: files of data sets have no digest of what they hold, so damage may also read as other pixels or another class."


def crashes(folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """The section of the table, and whether a point failed."""
    about = "At each, what SIGKILL would leave is copied, and one more process goes on from there to the end; equal copies once."
    return _killed(folder, options, crash_points.scenarios, crash_points.visit_points, options.every, about)


def parts(folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """The same of checkpoints in parts, every point of them."""
    about = "SIGKILL, then one more process goes on to the end."
    return _killed(folder, options, crash_points.in_parts, crash_points.check_points, 1, about)


def _killed(
    folder: Path,
    options: argparse.Namespace,
    among: Callable[[], Iterator[crash_points.Scenario]],
    check: Callable[..., Iterator[tuple[tuple[int, crash_points.Point], list[str]]]],
    every: int,
    how: str,
) -> tuple[list[str], bool]:
    known = crash_points.prepared(folder, among=among)
    points = [(i, point) for i, scenario in enumerate(known) for point in scenario.points()]
    chosen = points[::every]
    print(f"{len(chosen)} of {len(points)} crash points", flush=True)
    found = {}
    for (index, point), wrong in check(folder, chosen, options.jobs):
        found[index, point] = wrong
        if wrong:
            print(f"{known[index].name}: {point}: {wrong}", flush=True)
    return [f"{len(chosen):,} of {len(points):,} points. {how}", "", *crash_points.table(found)], any(found.values())


def ranks(folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """The same of one of two ranks, in a save that has a checkpoint before it."""
    both, found = rank_points.Ranks(folder), {}
    points = list(both.points())
    for point in points[:: options.every]:
        found[point] = both.check(point)
        if found[point]:
            print(f"{point}: {found[point]}", flush=True)
    about = f"{len(found)} of {len(points)} points. One rank gets SIGKILL, the other ends by itself, then both go on to the end."
    return [about, "", *rank_points.table(both.calls, found)], any(found.values())


def flips(folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """The section of the table, and whether damage was taken for good."""
    gc.enable()
    print(f"seed {options.seed}, {options.flips} flips", flush=True)
    found, faults = bit_flips.flip(folder, options.flips, options.seed)
    print("\n".join(faults))
    about = f"Seed {options.seed}: one bit flipped, or (one of five) the file cut short. Harmless: what is read has the same bits. {_OTHER}"
    return [about, "", *bit_flips.table(found)], bool(faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one part; the other stays in the table as it is")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that kill and resume")
    parser.add_argument("--every", type=int, default=1, help="each n-th crash point only")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    gc.disable()  # every process here is short
    warnings.simplefilter("ignore")
    failed = False
    # Crashes first: a process that has computed gradients cannot be forked.
    for name in PARTS:
        if options.part not in (None, name):
            continue
        with crash_points.work_folder() as folder:
            section, wrong = {"crashes": crashes, "parts": parts, "ranks": ranks, "flips": flips}[name](Path(folder), options)
        failed |= wrong
        print("\n".join(section), flush=True)
        if options.out:
            _write(options.out, name, section)
    return int(failed)


def _write(out: Path, name: str, section: list[str]) -> None:
    """Replaces one section of the table."""
    old = out.read_text().split("\n## ")[1:] if out.exists() else []
    sections = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in old}
    head = heading(PARTS[name], None).replace("# ", "", 1).partition("\n")[2].strip()
    sections[PARTS[name]] = "\n".join([head, "", *section])
    about = (__doc__ or "").partition("\n")[0]
    parts = [f"# Files of runs\n\n{about}", *(f"## {title}\n\n{sections[title]}" for title in PARTS.values() if title in sections)]
    out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
