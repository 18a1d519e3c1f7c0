"""A sample of `tools/chaos.py`: ranks of a run are killed at random moments, and torchrun's launcher starts all ranks again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "chaos.py"


def test_a_run_whose_ranks_are_killed_ends_as_if_they_were_not() -> None:
    # A process of its own: the launcher takes the signals of the one that it runs in.
    options = ["--kills", "3", "--seed", "1", "--kinds", "ddp", "--forked"]
    done = subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "3 kills: " in done.stdout
