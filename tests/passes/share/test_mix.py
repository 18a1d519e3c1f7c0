"""Mixed weights: what they compute, whose gradients they are, and how checkpoints go in and out."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import graphopt
from graphopt import PassError, Plan
from graphopt.cost import forecast, measure
from graphopt.ir.printing import graph_text
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.share import Share
from graphopt.passes.share.neighbours import MixedTensor
from tests.passes.share.backbones import FAMILIES, compiled, family, family_plan, shared_blocks


def mixed_tensors(plan: Plan) -> list[MixedTensor]:
    return [t for block in shared_blocks(plan).values() for t in block.tensors]


def scalars(plan: Plan) -> list[str]:
    return [n for n, _ in plan.module.named_parameters() if n.rpartition(".")[2] in ("a", "b") and ".share" in n]


def disturb(module: nn.Module) -> None:
    """As training would: every parameter moves, statistics too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1)


def reference(model: nn.Module, plan: Plan, x: Tensor, *, detach: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The backbone itself with mixed weights by functional_call, from the plan's parameters as leaves."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in plan.module.named_parameters()}
    state = {**dict(plan.module.named_buffers()), **leaves}
    own = {k: v for k, v in state.items() if k in model.state_dict()}
    for tensor in mixed_tensors(plan):
        holder = next(n.rpartition(".")[0] for n in scalars(plan) if tensor.name.startswith(n.partition(".share")[0] + "."))
        before, after = (leaves[s].detach() if detach else leaves[s] for s in tensor.sources)
        own[tensor.name] = leaves[f"{holder}.a"] * before + leaves[f"{holder}.b"] * after
    return functional_call(model, own, (x,)), leaves


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_its_backbone_would_with_mixed_weights(name: str) -> None:
    model, shape, count = family(name)
    plan = family_plan(name)
    assert len(plan.report.passes[0].regions) == count
    state = plan.module.state_dict()
    assert not any(t.name in state for t in mixed_tensors(plan)), "a replaced weight is still stored"
    disturb(plan.module)
    module, stock = copy.deepcopy(plan.module).double().eval(), copy.deepcopy(model).double().eval()
    x = torch.rand(3, *shape, dtype=torch.float64)
    expected, leaves = reference(stock, dataclasses.replace(plan, module=module), x)
    got = module(x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weights = torch.rand(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for parameter, value in module.named_parameters():
        theirs = leaves[parameter].grad
        if parameter in plan.base.unused:
            continue
        assert value.grad is not None, parameter
        torch.testing.assert_close(value.grad, torch.zeros_like(value) if theirs is None else theirs, rtol=1e-9, atol=1e-11)


EVERYTHING: dict[str, Any] = {"parts": "all", "norm": "mix", "scalars": "parameter"}


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FAMILIES), *((name, EVERYTHING) for name in list(FAMILIES)[::2])])
def test_every_family_exports(name: str, options: dict[str, Any]) -> None:
    model, shape, _ = family(name)
    try:
        plan = family_plan(name, **options)
    except PassError as error:
        assert "BatchNormAct2d) is one leaf with buffers" in str(error)  # noqa: PT017 (the reason is part of the table)
        assert "ResNetV2" in name
        return
    disturb(plan.module)
    exported = plan.export()
    assert type(exported) is type(model)
    assert exported.state_dict().keys() == model.state_dict().keys()
    fresh = FAMILIES[name][0]()
    fresh.load_state_dict(plan.export_state(), strict=True)
    x = torch.rand(2, *shape)
    with torch.no_grad():
        expected = plan.module.eval()(x)
        torch.testing.assert_close(fresh.eval()(x), expected, rtol=1e-4, atol=1e-6)
    # And in again: the scalars come back out of the blended weights.
    back = family_plan(name, **options)
    back.load_backbone(plan.export_state())
    for key, value in plan.module.state_dict().items():
        torch.testing.assert_close(back.module.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_the_graph_as_text() -> None:
    plan = compiled(CifarResNet(20), (3, 8, 8), every=2, select={"blocks": True, "first": 2})
    lines = [" ".join(line.split()) for line in graph_text(plan.graph).splitlines() if "layer1.1" in line]
    assert lines[:6] == [
        "layer1_1_share_a get layer1.1.share.a -> () # layer1.1.conv1, pass 1",
        "layer1_1_share_b get layer1.1.share.b -> () # layer1.1.conv1, pass 1",
        "layer1_0_conv1_weight get layer1.0.conv1.weight -> (16, 16, 3, 3) # layer1.1.conv1, pass 1",
        "layer1_2_conv1_weight get layer1.2.conv1.weight -> (16, 16, 3, 3) # layer1.1.conv1, pass 1",
        "mix mix(layer1_0_conv1_weight, layer1_2_conv1_weight, layer1_1_share_a, layer1_1_share_b) -> (16, 16, 3, 3) "
        "# layer1.1.conv1, pass 1",
        "layer1_1_conv1 conv2d(relu_2, mix, None, (1, 1), (1, 1), (1, 1), 1) -> (N, 16, 8, 8) # layer1.1.conv1, pass 1",
    ]


def test_scalars_are_shapeless_float32_and_never_decayed() -> None:
    plan = compiled(CifarResNet(20), (3, 8, 8), every=2, init=(0.7, 0.3))
    assert scalars(plan) == ["layer1.1.share.a", "layer1.1.share.b"]
    assert plan.no_decay == set(scalars(plan))
    for name in scalars(plan):
        value = plan.module.get_parameter(name)
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(0.7 if name.endswith("a") else 0.3)


def test_a_pair_of_scalars_per_tensor() -> None:
    plan = compiled(CifarResNet(20), (3, 8, 8), select="layer1.1", scalars="parameter")
    assert set(scalars(plan)) == {f"layer1.1.share.conv{i}_weight.{s}" for i in (1, 2) for s in "ab"}


def test_detached_mixes_leave_their_sources_alone() -> None:
    model = CifarResNet(20).double()
    plan = compiled(model, (3, 8, 8), select="layer1.1", detach=True)
    module = plan.module.double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected, leaves = reference(copy.deepcopy(model).eval(), plan, x, detach=True)
    expected.square().sum().backward()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-11)


def test_norms_stay_a_blocks_own_unless_asked() -> None:
    own = compiled(CifarResNet(20), (3, 8, 8), select="layer1.1").module.state_dict()
    mixed = compiled(CifarResNet(20), (3, 8, 8), select="layer1.1", norm="mix").module.state_dict()
    assert "layer1.1.bn1.weight" in own
    assert "layer1.1.bn1.weight" not in mixed
    assert "layer1.1.bn1.running_mean" in mixed, "statistics are of a block's own activations"


@pytest.mark.parametrize("momentum", [0.1, None])
def test_mixed_norms_keep_statistics_as_stock_ones_do(momentum: float | None) -> None:
    model = CifarResNet(20)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    plan = compiled(model, (3, 8, 8), select="layer1.1", norm="mix")
    stock = plan.export()
    x = torch.rand(4, 3, 8, 8)
    for module in (plan.module.train(), stock.train()):
        module(x)
        module(x * 2)
    for key, value in stock.named_buffers():
        torch.testing.assert_close(plan.module.get_buffer(key), value)


def test_another_checkpoint_leaves_the_scalars_as_they_are() -> None:
    plan = compiled(CifarResNet(20), (3, 8, 8), select="layer1.1", init=(0.6, 0.4))
    other = CifarResNet(20).state_dict()
    plan.load_backbone(other)
    state = plan.module.state_dict()
    assert state["layer1.1.share.a"].item() == pytest.approx(0.6)
    assert torch.equal(state["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


def test_the_users_model_is_left_as_it_was() -> None:
    model = CifarResNet(20)
    before = copy.deepcopy(model.state_dict())
    plan = compiled(model, (3, 8, 8), every=2)
    disturb(plan.module)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_figures_and_statuses() -> None:
    plan = compiled(CifarResNet(20), (3, 8, 8), select="layer1.1")
    report = plan.report.passes[0].to_dict()
    assert report["figures"] == {"shared": 1, "tensors_replaced": 2, "parameters_removed": 2 * 16 * 16 * 9 - 2}
    assert plan.effects[0] is not None
    status = plan.effects[0].statuses["layer1.1"]
    assert (status.status, status.sources) == ("shared", ("layer1.0", "layer1.2"))
    assert status.detail == {"a": 0.5, "b": 0.5, "mode": "mix", "part": "all"}


def test_a_leaf_that_is_called_with_its_weights_can_be_measured() -> None:
    """An LSTM computes from what it is given; the weights that it still holds have no values."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lstm(x)[0]

    plan = graphopt.compile(nn.Sequential(*(Block() for _ in range(3))), Share(select="1"), input=(4, 6), verify="off", costs=False)
    assert measure(plan.module, (4, 6), 2).parameters == forecast(plan.module, (4, 6), 2).parameters
