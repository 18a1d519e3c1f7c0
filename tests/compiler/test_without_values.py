"""Backbones whose Python asks for the values of tensors: what a forecast cannot know is said, and everything else works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.cost import forecast, measure
from graphopt.errors import NeedsValuesError
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from tests.support.backbones import FourBlocks

SHAPE = (3, 8, 8)
PASSES: dict[str, list[Any]] = {
    "none": [],
    "freeze": [Freeze(select="stem")],
    "share": [Share(every=2)],
    "drop": [Drop(upto="blocks.0")],
    "bypass": [Drop(mode="bypass")],
    "supervise": [Supervise(modules=2)],
    "checkpoint": [Checkpoint(segments=2)],
}
BY_MEMORY: dict[str, list[Any]] = {
    "supervise by memory": [Supervise(modules=2, balance="memory")],
    "checkpoint by memory": [Checkpoint(segments=2, balance="memory")],
}


class CumulativeNorm(nn.Module):
    """A residual block whose norm averages all batches alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


class Item(nn.Module):
    """A residual block that branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def looks(self, x: Tensor) -> bool:
        return x.mean().item() > 100

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(2 * x if self.looks(x) else x)


class Implicit(Item):
    def looks(self, x: Tensor) -> bool:
        return x.mean() > 100  # type: ignore[return-value]  # the tensor is asked for its truth


class Any_(Item):
    def looks(self, x: Tensor) -> bool:
        return bool((x > 100).any())


def trains(plan: graphopt.Plan) -> bool:
    x, y = torch.rand(4, *SHAPE), torch.arange(4)
    output, local = plan.module.train()(x, y) if plan.needs.targets else (plan.module.train()(x), 0)
    (F.cross_entropy(output, y) + local).backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in plan.module.parameters() if p.requires_grad)


@pytest.mark.parametrize("passes", [*PASSES.values(), *BY_MEMORY.values()], ids=[*PASSES, *BY_MEMORY])
def test_norms_that_average_all_batches_are_forecast(passes: list[Any]) -> None:
    plan = graphopt.compile(FourBlocks(CumulativeNorm), passes, input=SHAPE)
    assert plan.report.after is not None
    for module, targets in ((plan.backbone, False), (plan.module, plan.needs.targets)):
        one, other = (cost(module, SHAPE, 2, targets=targets) for cost in (forecast, measure))
        assert one.peak_bytes == other.peak_bytes
        assert one.saved_activation_bytes == other.saved_activation_bytes
    assert all(m.momentum is None for m in plan.module.modules() if isinstance(m, nn.BatchNorm2d))
    assert trains(plan)


@pytest.mark.parametrize("passes", [v for k, v in PASSES.items() if k != "bypass"], ids=[k for k in PASSES if k != "bypass"])
@pytest.mark.parametrize("block", [Item, Implicit, Any_])
def test_without_a_forecast_a_plan_says_why_it_has_no_costs(block: type[nn.Module], passes: list[Any]) -> None:
    plan = graphopt.compile(FourBlocks(block), passes, input=SHAPE)
    assert [path for path, _ in plan.report.opaque] == [f"blocks.{i}" for i in range(4)]
    assert plan.report.before is None
    assert plan.report.after is None
    assert "looks at tensor values" in (plan.report.no_costs or "")
    assert plan.report.to_dict()["no_costs"] == plan.report.no_costs
    assert trains(plan)


def test_what_cannot_do_without_a_forecast_says_so_in_one_line() -> None:
    with pytest.raises(NeedsValuesError, match="looks at tensor values") as caught:
        graphopt.compile(FourBlocks(Item), BY_MEMORY["supervise by memory"], input=SHAPE)
    assert "\n" not in str(caught.value)


def test_segments_are_even_where_memory_cannot_be_forecast() -> None:
    plan = graphopt.compile(FourBlocks(Item), BY_MEMORY["checkpoint by memory"], input=SHAPE)
    assert plan.report.passes[0].figures["segments"] == 2
    assert trains(plan)


def test_a_plan_with_costs_says_nothing() -> None:
    assert graphopt.compile(FourBlocks(CumulativeNorm), [], input=SHAPE).report.no_costs is None
