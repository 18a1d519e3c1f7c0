"""ghost_norm: statistics over a few samples at a time."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PassError
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from tests.support.small_passes import BACKBONES, trained


@pytest.mark.parametrize("batch", [3, 4, 7, 12])
def test_each_run_of_samples_is_a_batch_of_its_own(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    reference = copy.deepcopy(model).train()
    plan = graphopt.compile(model, GhostNorm(samples=3), input=(3, 8, 8), costs=False)
    x = torch.randn(batch, 3, 8, 8)
    edges = [*range(0, batch // 3 * 3, 3), batch] if batch >= 6 else [0, batch]
    expected = torch.cat([reference[:2](x[a:b]) for a, b in pairwise(edges)])
    torch.testing.assert_close(plan.module.train()(x), reference[2:](expected))
    ours, theirs = plan.module.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    assert torch.equal(plan.export()(x), plan.module.eval()(x))


@pytest.mark.parametrize("passes", [[Freeze(select="layer1")], [Checkpoint(segments=2)], [Freeze(select="layer2"), Checkpoint(segments=2)]])
@pytest.mark.parametrize("first", [True, False])
def test_with_other_passes(passes: list[graphopt.Pass], first: bool) -> None:
    model, input = BACKBONES["resnet"]()
    ghost = GhostNorm(samples=4)
    plan = graphopt.compile(model, [ghost, *passes] if first else [*passes, ghost], input=input, verify="full", costs=False)
    counted = plan.module.get_buffer("layer3.0.bn1.num_batches_tracked").clone()
    trained(plan, input)
    assert plan.module.get_buffer("layer3.0.bn1.num_batches_tracked") == counted + 2 * 2


def test_a_backbone_without_batch_norms_is_refused() -> None:
    model, input = BACKBONES["vit"]()
    with pytest.raises(PassError, match="there is no batch norm"):
        graphopt.compile(model, GhostNorm(select="blocks"), input=input, costs=False)
