"""adapt: what is added trains, the rest stays to the bit, and export adds it to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import PassError
from graphopt.passes.adapt import Adapt
from graphopt.passes.drop import Drop
from tests.support.steps import BACKBONES, trained


@pytest.mark.parametrize("name", BACKBONES)
def test_only_what_is_added_and_the_classifier_train_and_the_ordinary_model_comes_back(name: str) -> None:
    model, input = BACKBONES[name]()
    before = copy.deepcopy(model.state_dict())
    plan = graphopt.compile(model, [Adapt(rank=2)], input=input, verify="full", costs=False)
    trainable = {n for n, p in plan.module.named_parameters() if p.requires_grad}
    added = {n for n in trainable if n not in before}
    assert added
    assert {n.rpartition(".")[0] for n in trainable - added} == {"fc" if name == "resnet" else "head"}
    trained(plan, input)
    x = torch.randn(3, *input)
    exported = plan.export()
    torch.testing.assert_close(exported(x), plan.module.eval()(x))
    after = exported.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    adapted = {n.removesuffix("_down.weight") + ".weight" for n in added if n.endswith("_down.weight")}
    assert changed == adapted | (trainable - added)  # no running statistic among them


def test_a_checkpoint_of_the_backbone_starts_with_nothing_added() -> None:
    model, input = BACKBONES["resnet"]()
    plan = graphopt.compile(model, Adapt(rank=1), input=input, costs=False)
    trained(plan, input)
    plan.load_backbone(model.state_dict())
    x = torch.randn(2, *input)
    assert torch.equal(plan.module.eval()(x), model.eval()(x))


def test_what_it_adds_is_small_and_scaled() -> None:
    layer = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    plan = graphopt.compile(layer, Adapt(select="0", rank=2, scale=0.5), input=(6,), costs=True)
    assert plan.report.passes[0].figures == {"layers": 1, "added_parameters": 2 * (6 + 4)}
    state = plan.module.state_dict()
    with torch.no_grad():
        plan.module.get_parameter("0_up.weight").fill_(1.0)
    x = torch.randn(5, 6)
    expected = F.linear(x, state["0.weight"], state["0.bias"]) + 0.5 * F.linear(F.linear(x, state["0_down.weight"]), torch.ones(4, 2))
    torch.testing.assert_close(plan.module(x), layer[2](expected.relu()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"select": "bn1"}, "no selected layer can be adapted"),
        ({"select": "fc"}, "no selected layer can be adapted"),
        ({"when": {"epoch": 1, "until": 2}}, "cannot be taken back"),
        ({"rank": 500}, r"no selected layer can be adapted: \S+: its own rank is no more than 500"),
        ({"train": "*"}, r"no selected layer can be adapted: \S+: it trains fully"),
    ],
)
def test_what_is_refused(options: dict[str, object], says: str) -> None:
    model, input = BACKBONES["resnet"]()
    with pytest.raises(PassError, match=says):
        graphopt.compile(model, Adapt(**options), input=input, costs=False)


def test_a_second_one_is_refused() -> None:
    model, input = BACKBONES["resnet"]()
    with pytest.raises(PassError, match="pass 1 is adapt, too"):
        graphopt.compile(model, [Adapt(select="layer1"), Adapt(select="layer2")], input=input, costs=False)


def test_additions_under_a_prefix_that_is_dropped_later_stay() -> None:
    model, input = BACKBONES["resnet"]()
    late = Drop(upto="layer1", when={"epoch": 1})
    for passes in ([late, Adapt(rank=2)], [Adapt(rank=2), late]):
        plan = graphopt.compile(model, passes, input=input, verify="off", costs=False)
        trained(plan, input)
        later = plan.advance_to((*plan.decisions, *plan.due(1)))
        x = torch.randn(3, *input)
        torch.testing.assert_close(later.module.eval()(x), plan.module.eval()(x))


def test_a_factor_beyond_reason_and_a_network_without_parameters_are_errors() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        Adapt(scale=1e308)
    with pytest.raises(PassError, match="no selected layer can be adapted"):
        graphopt.compile(torch.nn.Sequential(torch.nn.ReLU()), Adapt(select="0"), input=(3,), costs=False)


def test_another_seed_gives_other_additions_and_leaves_the_stream_alone() -> None:
    model, input = BACKBONES["resnet"]()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        plan = graphopt.compile(model, Adapt(select="layer3", rank=1), input=input, verify="off", costs=False)
        found.append(([p.detach() for n, p in plan.module.named_parameters() if "_down." in n], torch.rand(())))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert not torch.equal(found[0][0][0], found[2][0][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), found[0][1])
