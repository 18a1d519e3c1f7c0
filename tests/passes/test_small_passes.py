"""Small passes behind others, which have frozen, removed or left the training graph with what they would change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.adapt import Adapt
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from graphopt.passes.share import Share
from tests.support.steps import BACKBONES, trained

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


class Aside(nn.Module):
    """Blocks of equal layers; nothing reads what the last two give, nor the layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aside = nn.Conv2d(3, 8, 1), nn.Linear(8, 5), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [self.stem(x)]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        self.aside(states[-1].mean((2, 3)))
        return self.head(states[2].mean((2, 3)))


@pytest.mark.parametrize(
    "new", [Adapt(rank=2), Factorize(rank=2), Share(select="blocks.1", every=1), Share(select=["blocks.1", "blocks.3"], every=1)]
)
def test_nothing_is_added_where_no_gradient_arrives(new: graphopt.Pass) -> None:
    plan = graphopt.compile(Aside(), new, input=(3, 8, 8), verify="full", costs=False)
    skipped = {d.location: d.message for d in plan.report.passes[0].diagnostics}
    assert not any(location.startswith(("blocks.0", "blocks.1", "head")) and "gradient" in why for location, why in skipped.items())
    assert all(
        not n.startswith(("blocks.2", "blocks.3", "aside")) for n, _ in plan.module.named_parameters() if "_down" in n or ".share." in n
    )
    assert plan.module.get_parameter("head.weight").requires_grad
