"""What regions give for the same images, compared from epoch to epoch, and a freeze that goes by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import graphopt
from graphopt.compiler.triggers import Score
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.train import History, train
from graphopt.train.loop import Phases
from graphopt.train.preflight import check_strategy
from graphopt.train.similarity import distance, similarities
from tests.support.backbones import Small
from tests.train import small

EGERIA = Freeze(select=["stem", "blocks.0"], when=Score(score="plasticity", window=2, patience=1, below=0.9))


@pytest.fixture(scope="module")
def plan() -> graphopt.Plan:
    torch.manual_seed(0)
    return graphopt.compile(Small(), EGERIA, input=(3, 8, 8), verify="off", costs=False)


def test_similarities_are_those_of_the_paper(plan: graphopt.Plan) -> None:
    images = torch.randn(4, 3, 8, 8)
    outputs: dict[str, Any] = {}
    hook = plan.backbone.stem.register_forward_hook(lambda module, args, output: outputs.update(stem=output))
    plan.backbone.eval()(images)
    hook.remove()
    rows = outputs["stem"].reshape(4, -1).double()
    expected = F.normalize(rows @ rows.T, dim=1)
    found = similarities(plan, images)
    assert found.keys() == {"stem", "blocks.0"}
    torch.testing.assert_close(found["stem"], expected)
    assert plan.module.training


def test_the_distance_is_the_papers_loss() -> None:
    one, other = torch.rand(3, 3).double(), torch.rand(3, 3).double()
    assert distance(one, other) == pytest.approx(float(torch.linalg.matrix_norm(one - other)) ** 2 / 9)


def test_outputs_are_compared_with_those_of_the_epoch_before_at_the_same_size() -> None:
    history, same, other = History(), torch.eye(2).double(), torch.zeros(2, 2).double()
    for epoch, (size, value) in enumerate([("8", same), ("8", other), ("8", other), ("16", other), ("16", same)]):
        history.close(epoch, {}, {}, {}, size, {"a": value})
    assert history.plasticity("a") == [math.inf, 0.5, 0.0, math.inf, 0.5]
    assert History.from_state_dict(history.state_dict()).records == history.records


def test_a_run_freezes_by_it_and_a_stopped_one_decides_alike(tmp_path: Path) -> None:
    settings = small.settings(epochs=8)
    summary = train(small.plan((EGERIA,)), tmp_path / "whole", settings=settings, data=small.DATA)
    assert [decision["regions"] for phase in summary.phases for decision in phase["decisions"]]
    with pytest.raises(RunError, match="stopped"):
        train(small.plan((EGERIA,)), tmp_path / "parts", settings=settings, data=small.interrupting(96 * 6 + 40))
    again = train(small.plan((EGERIA,)), tmp_path / "parts", settings=settings, data=small.interrupting(10**9), resume=True)
    assert again.phases == summary.phases
    assert small.same(small.weights(tmp_path / "whole"), small.weights(tmp_path / "parts"))


def test_a_loop_of_ones_own_gives_the_images(plan: graphopt.Plan) -> None:
    with pytest.raises(RunError, match="Give images"):
        Phases(plan, epochs=4)
    phases = Phases(plan, lambda module: torch.optim.SGD(module.parameters(), lr=0.0), epochs=5, images=torch.randn(4, 3, 8, 8))
    # Nothing trains: outputs stay where they are, and everything has converged as soon as it can be told.
    assert [phases.begin(epoch) for epoch in range(5)] == [False, False, False, True, False]


@pytest.mark.parametrize("strategy", ["fsdp", "modules"])
def test_parts_of_a_network_are_not_compared(plan: graphopt.Plan, strategy: str) -> None:
    with pytest.raises(RunError, match=r"compares the outputs of stem.*of which each process has only a part"):
        check_strategy(plan, small.settings(strategy=strategy), 2)
