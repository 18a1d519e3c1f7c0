"""Small passes behind others, which have frozen, removed or left the training graph with what they would change."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.passes.adapt import Adapt
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from tests.support.small_passes import BACKBONES, trained

EARLIER = {"prefix": Drop(upto="layer1"), "bypass": Drop(mode="bypass", select="layer1"), "freeze": Freeze(select="layer1")}
LATER = {"adapt": Adapt(rank=2), "factorize": Factorize(rank=4), "ghost_norm": GhostNorm(samples=2), "blurpool": BlurPool(select="layer2")}


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("later", LATER)
def test_what_an_earlier_pass_took_is_left_alone(earlier: str, later: str) -> None:
    model, input = BACKBONES["resnet"]()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("conv1", "layer1"))}
    passes = [EARLIER[earlier], LATER[later]]
    if (earlier, later) == ("freeze", "adapt"):
        with pytest.raises(graphopt.PassError, match="cannot be adapted and frozen"):
            graphopt.compile(model, passes, input=input, costs=False)
        return
    plan = graphopt.compile(model, passes, input=input, verify="full", costs=False)
    skipped = {d.location for d in plan.report.passes[1].diagnostics}
    assert later == "blurpool" or any(location.startswith("layer1") for location in skipped)
    if plan.needs.features is None:
        trained(plan, input)
        if later != "blurpool" and earlier == "freeze":
            after = plan.export().state_dict()
            assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("layer1"))
