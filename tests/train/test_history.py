from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.passes.freeze import Freeze
from graphopt.train import History, run, train
from graphopt.train.evaluation import SUMS
from tests.train import small

REGIONS = {"one": ("one.weight", "one.bias"), "two": ("two.weight",)}


def weights(scale: float = 1.0) -> dict[str, Tensor]:
    return {"one.weight": torch.full((3,), 3.0) * scale, "one.bias": torch.full((1,), 4.0), "two.weight": torch.zeros(2)}


def test_change_is_the_distance_moved_over_the_norm_before() -> None:
    history = History()
    history.watch(REGIONS, weights())
    history.close(0, {"accuracy": 0.5}, REGIONS, weights(2.0))
    history.close(1, {"accuracy": 0.6}, REGIONS, weights(2.0))
    assert history.change("one") == pytest.approx([math.sqrt(27 / 43), 0.0])
    assert [record.metrics["accuracy"] for record in history.records] == [0.5, 0.6]


def test_weights_that_were_zero() -> None:
    history = History()
    history.watch(REGIONS, weights())
    history.close(0, {}, REGIONS, weights())
    history.close(1, {}, REGIONS, {**weights(), "two.weight": torch.ones(2)})
    assert history.change("two") == [0.0, math.inf]


def test_a_region_scored_from_a_later_epoch_on_has_no_change_before() -> None:
    history = History()
    history.watch({}, weights())
    history.close(0, {}, {}, weights())
    history.watch(REGIONS, weights())
    history.close(1, {}, REGIONS, weights(2.0))
    assert len(history.change("one")) == 1


def test_snapshots_do_not_follow_the_weights() -> None:
    history, moving = History(), weights()
    history.watch(REGIONS, moving)
    moving["one.weight"].mul_(2)
    history.close(0, {}, REGIONS, moving)
    assert history.change("one")[0] > 0


def test_it_goes_through_a_weights_only_checkpoint() -> None:
    history = History()
    history.watch(REGIONS, weights())
    history.close(0, {"accuracy": 0.5}, REGIONS, weights(1.5))
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    again = History.from_state_dict(torch.load(file, weights_only=True))
    for each in (history, again):
        each.close(1, {"accuracy": 0.7}, REGIONS, weights(3.0))
    assert again.records == history.records


def test_regions_of_triggers_that_measure_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.compiler.triggers import BaseTrigger
    from graphopt.train import train
    from tests.train.passes import Hold

    seen: list[Any] = []

    class Watching(BaseTrigger):
        def fire(self, names: Any, active: Any, epoch: int, epochs: Any, history: Any) -> list[Any]:
            seen.append([list(history.change(name)) for name in names])
            return [("apply", (names[0],))] if epoch == 2 and not active else []

        @property
        def foreseeable(self) -> bool:
            return False

    held = Hold.model_construct(select="blocks.*", when=Watching(), norms=True)
    train(small.plan([held]), tmp_path, settings=small.settings(), data=small.DATA)
    assert [len(changes[0]) for changes in seen[-2:]] == [1, 2]
    assert all(0 < change < 1 for changes in seen[-1] for change in changes)
    assert set(small.records(tmp_path, "epoch")[0]["change"]) == {f"blocks.{i}" for i in range(4)}
    decided = small.records(tmp_path, "phase")[-1]["decisions"]
    assert decided[0]["regions"] == ["blocks.0"]


def test_a_run_thaws_when_its_loss_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 0.9, 1.2, 0.9, 0.8])
    evaluate = run.evaluate

    def claimed(*arguments: Any, **options: Any) -> Any:
        meter = evaluate(*arguments, **options)
        meter.sums[SUMS.index("loss")] = next(losses) * meter.samples
        return meter

    monkeypatch.setattr(run, "evaluate", claimed)
    when = {"score": "change", "below": 10.0, "patience": 1, "thaw": 0.1}
    train(small.plan([Freeze(select="blocks.0", when=when)]), tmp_path, settings=small.settings(epochs=5), data=small.DATA)
    decided = [(p["epoch"], [d["action"] for d in p["decisions"]]) for p in small.records(tmp_path, "phase")]
    assert decided == [(0, []), (1, ["apply"]), (3, ["undo"]), (4, ["apply"])]
