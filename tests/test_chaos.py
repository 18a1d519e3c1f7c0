"""A sample of `tools/chaos.py`: ranks of a run are killed at random moments, and torchrun's launcher starts all ranks again."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.support.ranks import serve

KILLS, SEED = 2, 1


@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_ranks_are_killed_ends_as_if_they_were_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import chaos

    serve()
    killer, outcomes = chaos.Killer(KILLS, random.Random(SEED), "ddp"), []
    # The launcher takes the signals of the process that it runs in, unless it has a thread of its own.
    disturbing = threading.Thread(target=lambda: outcomes.extend(chaos.disturb(tmp_path, killer, forked=True)))
    disturbing.start()
    disturbing.join(300)
    print(f"seed {SEED}", *chaos.table(killer.kills), sep="\n")
    assert sum(kills for kills, _ in outcomes) == len(killer.kills) == KILLS
    assert [wrong for _, wrong in outcomes if wrong] == []
