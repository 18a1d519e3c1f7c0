"""factorize: the nearest product of two smaller layers, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PassError
from graphopt.passes.factorize import Factorize
from graphopt.passes.layers import divide, full_rank, multiply
from graphopt.train import train
from tests.support.steps import BACKBONES, trained
from tests.train import small


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (8, 3, 3, 3), (3, 8, 1, 1)])
def test_the_product_is_the_nearest_of_its_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight.flatten(1))
    for rank in range(1, full_rank(weight) + 1):
        first, second = divide(weight, rank)
        assert first.shape == (rank, *shape[1:])
        assert second.shape == (shape[0], rank, *(1 for _ in shape[2:]))
        error = (multiply(first, second) - weight).norm()
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(first.norm(), second.norm())


def test_a_weight_of_zeros_stays_one() -> None:
    assert torch.equal(multiply(*divide(torch.zeros(4, 5), 2)), torch.zeros(4, 5))


@pytest.mark.parametrize("name", BACKBONES)
def test_it_trains_and_the_ordinary_model_computes_the_same(name: str) -> None:
    model, input = BACKBONES[name]()
    plan = graphopt.compile(model, Factorize(rank=0.25), input=input, verify="full", costs=True)
    report = plan.report
    assert report.after.parameters < report.before.parameters
    assert report.after.flops < report.before.flops
    assert 0 < report.passes[0].figures["kept_share_of_squared_weights"] < 1
    trained(plan, input)
    x = torch.randn(3, *input)
    torch.testing.assert_close(plan.export()(x), plan.module.eval()(x), atol=1e-4, rtol=1e-4)


def test_a_layer_of_low_rank_computes_what_it_did() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="circular")
    conv.weight.data = torch.einsum("or,rikl->oikl", torch.randn(8, 2), torch.randn(2, 4, 3, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(2, 4, 8, 8)
    plan = graphopt.compile(model, Factorize(select="0", rank=2), input=(4, 8, 8), costs=False)
    torch.testing.assert_close(plan.module(x), model(x), atol=1e-5, rtol=1e-5)
    assert [tuple(p.shape) for n, p in plan.module.named_parameters() if "weight" in n][:2] == [(8, 2, 1, 1), (3, 128)]


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_a_run_goes_on_where_weights_get_other_shapes(name: str, tmp_path: Path) -> None:
    """What the optimizer has of the rest stays; of a divided weight it begins anew, there and back."""
    plan = small.plan([Factorize(select="blocks.1", rank=0.5, when={"epoch": 1, "until": 2})])
    train(plan, tmp_path, settings=small.settings(epochs=3, optimizer={"name": name, "lr": 0.01}), data=small.DATA)
    assert [phase["epoch"] for phase in small.records(tmp_path, "phase")] == [0, 1, 2]


def test_a_run_measures_weights_that_get_other_shapes(tmp_path: Path) -> None:
    """From then on, change is that of the factors."""
    passes = [Factorize(select="blocks", rank=0.5, when={"score": "change", "below": 1e9, "patience": 1, "most": 1})]
    train(small.plan(passes), tmp_path, settings=small.settings(epochs=4), data=small.DATA)
    assert [phase["epoch"] for phase in small.records(tmp_path, "phase")][:2] == [0, 1]


def test_weights_that_are_computed_are_left_alone() -> None:
    """A weight norm's own weight is none of the layer's parameters."""
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), normed, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    plan = graphopt.compile(model, Factorize(select=("1", "2"), rank=2), input=(3, 6, 6), costs=False)
    assert plan.report.passes[0].figures["layers"] == 1
    assert any(d.location == "1" and "computes something of its own" in d.message for d in plan.report.passes[0].diagnostics)


def test_later_and_back() -> None:
    model, input = BACKBONES["resnet"]()
    plan = graphopt.compile(model, Factorize(select="layer3", rank=4, when={"epoch": 1, "until": 2}), input=input, costs=False)
    keys = plan.module.state_dict().keys()
    for epoch in (1, 2):
        plan = plan.advance_to([*plan.decisions, *plan.due(epoch, None, 3)])
        trained(plan, input)
        assert (plan.module.state_dict().keys() == keys) == (epoch == 2)
    assert full_rank(plan.module.get_parameter("layer3.0.conv2.weight")) > 4


@pytest.mark.parametrize(
    ("options", "says"), [({"select": "bn1"}, "no selected layer gets smaller"), ({"rank": 100}, "no selected layer gets smaller")]
)
def test_what_is_refused(options: dict[str, object], says: str) -> None:
    model, input = BACKBONES["resnet"]()
    with pytest.raises(PassError, match=says):
        graphopt.compile(model, Factorize(**options), input=input, costs=False)
