"""Several ranks, each with the whole network, train what one process trains with the same global batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from graphopt import Plan
from graphopt.passes.freeze import Freeze
from graphopt.passes.resize import Resize
from graphopt.train import train
from tests.distributed import cases
from tests.support.backbones import Small
from tests.support.plans import compiled_anew
from tests.support.ranks import run_process, run_ranks
from tests.train import small


def _in_ranks(_rank: int, folder: Path, plans: dict[str, Plan]) -> None:
    for name, plan in plans.items():
        try:
            cases.run(name, folder, made=plan)
        except Exception as error:
            raise RuntimeError(name) from error


def _train_all(folder: Path, names: list[str], ranks: int) -> None:
    """By ranks, and then alone: all are forked from this process, which compiles each plan once."""
    plans = {name: cases.plan_of(name) for name in names}
    run_ranks(_in_ranks, folder / "many", plans, ranks=ranks, forked=True)
    for name, plan in plans.items():
        cases.run(name, folder / "one", alone=True, made=plan)


#: of three ranks, what depends on their number: sums over ranks, decisions, running statistics, samples that do not divide
ON_THREE = ["supervise 4", "freeze prefix, averages, clipped", "freeze, thaw, drop with adamw", "synchronized norms, sections"]
ON_THREE += ["frozen by score"]


@pytest.mark.parametrize(("ranks", "names"), [(2, list(cases.CASES)), (3, ON_THREE)], ids=["two", "three"])
def test_ranks_train_what_one_process_trains(tmp_path: Path, ranks: int, names: list[str]) -> None:
    assert run_process(_train_all, tmp_path, names, ranks, timeout=300) == 0
    wrong = {}
    for name in names:
        case = cases.CASES[name]
        one, other = (cases.content(tmp_path / kind / name) for kind in ("one", "many"))
        assert one["decisions"] == other["decisions"], name
        assert one["decisions"] or name not in cases.DECIDED, name
        found = max(cases.distance(one["phase"][part], other["phase"][part], part) for part in ("model", "ema", "optimizer"))
        if found[0] > case.within:
            wrong[name] = found
        # One image more than a step takes: some ranks have none of them in the last batch.
        (*_, told), (*_, expected) = (small.records(tmp_path / kind / name, "epoch") for kind in ("many", "one"))
        for figure in ("loss", "accuracy", "train_loss", "train_accuracy"):
            assert told[figure] == pytest.approx(expected[figure], rel=max(case.within, 1e-9)), (name, figure)
    assert not wrong


def _resized(_rank: int, folder: Path, strategy: str = "auto") -> None:
    passes = [Resize(size=4, when={"epoch": 0, "until": 1}), Freeze(select="blocks.0", when={"schedule": "freezeout", "t0": 0.8})]
    made = compiled_anew(partial(Small, drop=0.0, norm=cases.GROUPS), passes, small.SHAPE)
    train(made, folder, settings=small.settings(epochs=2, strategy=strategy), data=small.DATA)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_images_follow_the_size_of_the_phase_on_every_rank(tmp_path: Path, strategy: str) -> None:
    run_ranks(_resized, tmp_path / "many", strategy)
    _resized(0, tmp_path / "one")
    many, one = small.weights(tmp_path / "many"), small.weights(tmp_path / "one")
    assert max(float((many[name] - one[name]).abs().max()) for name in one) < 1e-5
    assert [p["step"] for p in small.records(tmp_path / "many", "phase")] == [0, 6, 7]
