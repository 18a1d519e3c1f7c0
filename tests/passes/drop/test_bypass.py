"""drop: residual branches are left out, for good or at random."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import graphopt
from graphopt import Effects, Match, Pass, Severity
from graphopt.errors import PassError
from graphopt.ir.regions import region_at
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.drop import Drop
from graphopt.runtime.body import Checkpointed
from graphopt.runtime.randomness import set_seeds
from tests.passes.drop.networks import BACKBONES
from tests.support.backbones import Residual, Small


class WithoutWeights(Small):
    """Its branches end in norms that have no weights to set to zero."""

    def __init__(self) -> None:
        super().__init__(drop=0.0)
        for block in self.blocks:
            block.bn2 = nn.BatchNorm2d(8, affine=False)


class Overwriting(Small):
    """Its branches begin with a ReLU that writes into the block's input, and so into the shortcut."""

    class Block(Residual):
        def forward(self, x):
            return x + self.bn2(self.conv2(self.bn1(self.conv1(F.relu(x, inplace=True)))))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Block(8) for _ in range(2)))


def test_bypass_at_random_evaluates_as_the_backbone_and_expects_it():
    model = Small(drop=0.0)
    plan = graphopt.compile(model, [Drop(mode="bypass", probability=0.5)], input=(3, 8, 8), verify="full", costs=False)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(plan.module.eval()(x), model.eval()(x))
    probabilities = [s.probability for s in plan.module.get_submodule("sections").children()]
    assert probabilities == [0.125, 0.25, 0.375, 0.5], "linear by depth"
    branch = plan.module.get_submodule("sections.bypass_blocks_3").train()
    h = torch.rand(2, 8, 8, 8)
    plan.module.get_submodule("blocks.3").eval()
    full = branch.body(h)
    draws = [branch(h) for _ in range(200)]
    kinds = {bool(d.any()) for d in draws}
    assert kinds == {True, False}
    kept = next(d for d in draws if d.any())
    # A branch that runs is scaled so that the mean over draws is what eval mode adds.
    assert torch.allclose(kept * (1 - branch.probability), full)
    with pytest.raises(graphopt.PassError, match="both claim"):
        graphopt.compile(Small(), [Drop(mode="bypass"), Drop(upto="blocks.0")], input=(3, 8, 8), costs=False)


def test_a_skipped_branch_gets_zero_gradients():
    plan = graphopt.compile(Small(drop=0.0), [Drop(mode="bypass", probability=0.999)], input=(3, 8, 8), costs=False, verify="off")
    plan.module.train()
    torch.manual_seed(0)
    plan.module(torch.rand(2, 3, 8, 8)).sum().backward()
    gradient = plan.module.get_parameter("blocks.3.conv1.weight").grad
    assert gradient is not None
    assert not gradient.any()
    assert plan.module.get_parameter("stem.weight").grad.any()


@pytest.mark.parametrize("name", ["small", "resnet20", "vit", "convnext"])
def test_bypass_for_good_is_what_the_export_computes(name):
    build, shape, _ = BACKBONES[name]
    model = build()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)  # from 1e-6, where a branch adds less than rounding
    plan = graphopt.compile(model, [Drop(mode="bypass", select={"blocks": True, "last": 2})], input=shape, batch=2)
    x = torch.rand(2, *shape)
    ours = plan.module.eval()(x)
    assert torch.allclose(plan.export()(x), ours, atol=1e-6)
    assert not torch.equal(model.eval()(x), ours)
    assert plan.report.after.forward_flops < plan.report.before.forward_flops
    assert plan.report.after.trainable_parameters < plan.report.before.trainable_parameters


def test_blocks_that_change_shape_are_left_alone_with_the_reason():
    plan = graphopt.compile(cifar.build("resnet20"), [Drop(mode="bypass", probability=0.2)], input=(3, 8, 8), costs=False)
    skipped = {d.location: d.message for d in plan.report.passes[0].diagnostics if d.severity is Severity.SKIPPED}
    assert set(skipped) == {"layer2.0", "layer3.0"}
    assert "(16, 8, 8) goes in, (32, 4, 4) comes out" in skipped["layer2.0"]


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (lambda: cifar.build("resnet20"), {"select": "layer2.0"}, "not shape-preserving"),
        (lambda: WithoutWeights(), {}, "does not end in weights"),
        (lambda: Overwriting(), {"probability": 0.5}, "changes its shortcut in place"),
    ],
    ids=["another shape", "norms without weights", "in place"],
)
def test_nothing_to_bypass_is_an_error(build, options, reason):
    with pytest.raises(PassError, match=reason):
        graphopt.compile(build(), [Drop(mode="bypass", **options)], input=(3, 8, 8), costs=False)


def test_progressive_layer_dropping_joins_from_the_deepest():
    passes = [Drop(mode="bypass", probability=0.5, when={"schedule": "progressive", "gamma": 3.0})]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), costs=False)
    taken: list[str] = []
    for epoch in range(20):
        due = plan.due(epoch, None, 20)
        taken += [name for d in due for name in reversed(d.regions)]
        plan = plan.advance_to((*plan.decisions, *due), verify="fast") if due else plan
    assert taken == ["blocks.3", "blocks.2", "blocks.1"]
    assert [s.probability for s in plan.module.get_submodule("sections").children()] == [0.25, 0.375, 0.5], "by depth among all blocks"


INPLACE = {
    "basic": (lambda: torchvision.models.resnet18(num_classes=10), 5),
    "bottleneck": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 2, 1, 1], 10, width_per_group=16),
        2,
    ),
}


@pytest.mark.parametrize("name", INPLACE)
def test_blocks_with_an_activation_in_place_train_without_their_branches(name):
    build, bypassed = INPLACE[name]
    model, x = build(), torch.rand(4, 3, 32, 32)
    out_of_place = copy.deepcopy(model)
    for module in out_of_place.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    gradients = []
    for backbone in (model, out_of_place):
        plan = graphopt.compile(backbone, [Drop(mode="bypass")], input=(3, 32, 32), costs=False)
        assert len(plan.report.passes[0].regions) == bypassed
        plan.module.train()
        plan.module(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in plan.module.named_parameters() if p.requires_grad})
        assert torch.allclose(plan.export()(x), plan.module.eval()(x), atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("options", [{}, {"probability": 0.5}], ids=["for good", "at random"])
def test_deep_backbones(options):
    plan = graphopt.compile(cifar.build("resnet110"), [Drop(mode="bypass", **options)], input=(3, 8, 8), verify="off", costs=False)
    assert len(plan.report.passes[0].regions) == 52


def test_weights_that_are_used_elsewhere_are_neither_frozen_nor_set_to_zero():
    model = Small(drop=0.0)
    model.blocks[1].conv1.weight = model.blocks[0].conv1.weight
    select = ("blocks.1", "blocks.2")
    plan = graphopt.compile(model, [Drop(mode="bypass", select=select)], input=(3, 8, 8), costs=False)
    assert plan.module.get_parameter("blocks.0.conv1.weight").requires_grad
    assert not plan.module.get_parameter("blocks.1.conv2.weight").requires_grad

    model = Small(drop=0.0)
    model.blocks[1].bn2.weight = model.blocks[0].bn2.weight
    plan = graphopt.compile(model, [Drop(mode="bypass", select=select)], input=(3, 8, 8), costs=False)
    assert plan.report.passes[0].regions == ("blocks.2",)
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(plan.export()(x), plan.module.eval()(x), atol=1e-6)


def test_what_only_bypassed_branches_read_is_left_out_with_them():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x, table):
            return x + self.conv(x * table)

    class Positions(nn.Module):
        """Blocks that all read one table of the root."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.table = nn.Conv2d(3, 4, 1), nn.Linear(4, 5), nn.Parameter(torch.rand(4, 8, 8))
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, self.table)
            return self.head(x.mean((2, 3)))

    for select, trains in (("blocks.1", True), (None, False)):
        options = {} if select is None else {"select": select}
        plan = graphopt.compile(Positions(), [Drop(mode="bypass", **options)], input=(3, 8, 8), verify="full", costs=False)
        assert plan.module.get_parameter("table").requires_grad is trains


def test_a_branch_that_an_earlier_pass_has_divided_cannot_be_skipped():
    class FromTheMiddle(Pass):
        name: ClassVar[str] = "from_the_middle"

        def match(self, graph):
            return Match((region_at(graph, "blocks.1"),))

        def rewrite(self, edit, match):
            edit.outline(match.regions[0].nodes[3:], Checkpointed, "tail")
            return Effects()

    with pytest.raises(PassError, match=r"blocks.1: an earlier pass divides the block's branch"):
        graphopt.compile(Small(drop=0.0), [FromTheMiddle(), Drop(mode="bypass", probability=0.5)], input=(3, 8, 8), costs=False)


def test_compiled_it_draws_in_every_step_and_is_compiled_once() -> None:
    """More branches than a code object may be compiled for."""
    torch.manual_seed(0)
    plan = graphopt.compile(Small(blocks=9, drop=0.0), [Drop(mode="bypass", probability=0.5)], input=(3, 8, 8), verify="off", costs=False)
    eager = plan.module.double().train()
    module = copy.deepcopy(eager)
    backend = CompileCounter()
    call = torch.compile(module, backend=backend)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    frames, outputs = [], []
    for seed in (0, 1, 2, 0, 1, 2):
        for function in (eager, call):
            set_seeds(partial(int, seed), seed)
            outputs.append(function(x))
            outputs[-1].sum().backward()
        torch.testing.assert_close(*outputs[-2:])
        frames.append(backend.frame_count)
    set_seeds(None, None)
    assert frames[2:] == [frames[2]] * 4
    assert backend.frame_count >= 9 + 1
    for one, other in zip(eager.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_same_probability_for_all_blocks():
    options = {"mode": "bypass", "probability": 0.4, "distribution": "uniform"}
    plan = graphopt.compile(Small(drop=0.0), [Drop(**options)], input=(3, 8, 8), verify="full", costs=False)
    assert [s.probability for s in plan.module.get_submodule("sections").children()] == [0.4] * 4


@pytest.mark.parametrize("name", ["resnet8", "vit"])
def test_samples_are_left_out_one_by_one(name):
    model = Small(drop=0.0) if name == "resnet8" else torchvision.models.VisionTransformer(8, 4, 2, 1, 8, 8, num_classes=3)
    options = {"mode": "bypass", "probability": 0.9, "distribution": "uniform", "per": "sample"}
    plan = graphopt.compile(model, [Drop(**options)], input=(3, 8, 8), verify="full", batch=2)
    assert plan.module.state_dict().keys() == model.state_dict().keys()
    x = torch.rand(6, 3, 8, 8)
    assert torch.equal(plan.module.eval()(x), model.eval()(x))
    depths = [m for m in plan.module.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert [d.p for d in depths] == [0.9] * 4
    torch.manual_seed(0)
    branch = depths[0].train()(torch.ones(200, 2, 2))
    assert branch.unique().tolist() == pytest.approx([0.0, 10.0])
    assert all(len(sample.unique()) == 1 for sample in branch), "a sample as a whole"
    assert plan.report.after.forward_flops >= plan.report.before.forward_flops, "it saves nothing"


def test_options_of_random_bypass_need_a_probability():
    with pytest.raises(ValueError, match="give a probability"):
        Drop(mode="bypass", per="sample")
