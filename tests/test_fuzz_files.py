"""A sample of `tools/fuzz_files.py`: a run is killed at some of its system calls, and its files are damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.ranks import run_process

ROOT = Path(__file__).parents[1]
SEED = 1


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools' folder, from which they import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def _sample(out: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import crash_points

    with crash_points.work_folder() as folder:
        (whole, *_) = crash_points.prepared(Path(folder), 1)
        points = whole.points()
        killed, *copied = points[30 :: len(points) // 6]
        found = whole.visit(Path(folder) / "visited", copied) | {killed: whole.check(Path(folder) / "killed", killed)}
    out.write_text("\n".join([str(len(found)), *(f"{point}: {wrong}" for point, wrong in found.items() if wrong)]))


def test_a_run_that_is_killed_anywhere_ends_as_if_it_was_not(tmp_path: Path) -> None:
    import system_calls

    if not system_calls.available():
        pytest.skip("needs Linux on x86-64")
    # A process that has computed gradients cannot be forked; this one comes from one that has not.
    assert run_process(_sample, tmp_path / "found", timeout=300) == 0
    count, *wrong = (tmp_path / "found").read_text().splitlines()
    assert int(count) >= 6
    assert wrong == []


def test_damage_is_never_taken_for_good(tmp_path: Path) -> None:
    import bit_flips

    print(f"seed {SEED}")
    found, faults = bit_flips.flip(tmp_path, 64, SEED)
    assert faults == []
    assert sum(counts["refused with the file's name"] + counts["computed again"] for counts in found.values()) > 40
