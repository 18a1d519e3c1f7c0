"""drop: a prefix leaves training, and the rest trains on what it computed."""

from __future__ import annotations

import copy

import pydantic
import pytest
import timm
import torch
import torchvision
from torch import nn

import graphopt
from graphopt.compiler.triggers import Decision
from graphopt.errors import PassError, SelectError
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.trace import trace
from tests.backbones import Small


class Vgg(nn.Module):
    """A plain chain of conv-norm-act units, some with a pool, before a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


BACKBONES = {
    "small": (lambda: Small(), (3, 8, 8), "blocks.1"),
    "resnet20": (lambda: cifar.build("resnet20"), (3, 16, 16), "layer2"),
    "bottlenecks": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 10, width_per_group=16),
        (3, 32, 32),
        "layer2",
    ),
    "vgg": (lambda: Vgg(), (3, 32, 32), "features.4-7"),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10), (3, 32, 32), "features.transition1"),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10), (3, 32, 32), "blocks.1"),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10
        ),
        (3, 64, 64),
        "layers.0",
    ),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=10), (3, 32, 32), "stages.1"),
    "efficientnet": (lambda: timm.create_model("mobilenetv2_035", num_classes=10), (3, 32, 32), "blocks.3"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_prefix_and_suffix_are_the_network(name):
    build, shape, upto = BACKBONES[name]
    plan = graphopt.compile(build(), [Drop(upto=upto)], input=shape, verify="full", costs=False)
    plan.module.train()
    x = torch.rand(3, *shape)
    features = plan.prefix(x)
    assert features.shape[0] == 3
    torch.manual_seed(1)
    whole = plan.module(x)
    torch.manual_seed(1)
    assert torch.equal(whole, plan.suffix(features))
    inputs = [n for n in plan.suffix.graph.nodes if n.op == "placeholder"]
    assert [n.name for n in inputs] == ["features"], "the remaining graph has one input, and it is not the images"


def test_prefix_rests_whatever_train_says():
    plan = graphopt.compile(Small(drop=0.5), [Drop(upto="blocks.1")], input=(3, 8, 8), costs=False)
    before = {k: v.clone() for k, v in plan.module.state_dict().items()}
    plan.module.train()
    x = torch.rand(4, 3, 8, 8)
    loss = plan.module(x).square().mean()
    loss.backward()
    assert torch.equal(plan.prefix(x), plan.prefix(x)), "no dropout"
    after = plan.module.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[1] for k in moved} == {"2", "3"}, "statistics of the rest move, of the prefix do not"
    with_gradient = {n for n, p in plan.module.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in plan.module.named_parameters() if p.requires_grad}
    assert all(n.startswith(("blocks.2", "blocks.3", "fc")) for n in with_gradient)


def test_training_on_features_is_training_the_whole():
    plan = graphopt.compile(Small(drop=0.0), [Drop(upto="blocks.0")], input=(3, 8, 8), costs=False)
    twin = graphopt.compile(copy.deepcopy(plan.backbone), [Drop(upto="blocks.0")], input=(3, 8, 8), costs=False)
    twin.module.load_state_dict(plan.module.state_dict())
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    features = plan.prefix(x)
    for whole, module, given in ((plan, plan.suffix, features), (twin, twin.module, x)):
        module.train()
        optimizer = torch.optim.SGD([p for p in whole.module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(given), y).backward()
            optimizer.step()
    states = plan.module.state_dict(), twin.module.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_dropping_costs_less_and_export_is_the_backbone():
    model = cifar.build("resnet20")
    plan = graphopt.compile(model, [Drop(upto="layer2")], input=(3, 32, 32), batch=4)
    assert plan.report.after.forward_flops < 0.4 * plan.report.before.forward_flops
    assert plan.report.after.trainable_parameters < plan.report.before.trainable_parameters
    assert plan.report.passes[0].figures["feature_bytes_per_sample"] == 32 * 16 * 16 * 4
    exported = plan.export()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(exported(x), model.eval()(x))


def test_later_decisions_lengthen_the_prefix():
    passes = [Drop(when=[{"epoch": 1, "upto": "blocks.0"}, {"epoch": 3, "upto": "blocks.2"}])]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), costs=False)
    assert plan.needs.features is None
    assert all(p.requires_grad for p in plan.module.parameters())
    (first,) = plan.due(1, None, 5)
    assert first == Decision(index=0, epoch=1, regions=("blocks.0",))
    plan = plan.advance_to([first])
    assert plan.needs.features.region == "blocks.0"
    (second,) = plan.due(3, None, 5)
    assert second.regions == ("blocks.2",)
    plan = plan.advance_to([first, second])
    assert plan.needs.features.region == "blocks.2"
    assert {n.split(".")[0] for n, p in plan.module.named_parameters() if not p.requires_grad} == {"stem", "blocks"}
    assert plan.due(4, None, 5) == ()


def test_scored_drops_start_at_the_input_and_leave_the_head():
    graph = trace(cifar.build("resnet20"), (3, 8, 8))
    names = [r.name for r in Drop(when={"score": "change"}).match(graph).regions]
    assert names == [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    first = Drop(when={"score": "change"}).match(graph).regions[0]
    assert "conv1.weight" in first.parameters, "the stem goes with the first block"
    capped = [r.name for r in Drop(when={"score": "change"}, upto="layer2").match(graph).regions]
    assert capped[-1] == "layer2"
    assert "layer3.0" not in capped


def test_dense_blocks_are_cut_at_transitions_only():
    graph = trace(torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10), (3, 32, 32))
    with pytest.raises(PassError, match=r"not closed.*features"):
        Drop(upto="features.denseblock1.denselayer1").match(graph)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"upto": "blocks.1.conv1"}, "not closed.*'blocks.0' and 'blocks.1'"),
        ({"upto": "fc"}, "head itself cannot be dropped.*'blocks'"),
        ({"upto": "blocks.1", "limit": "16 B"}, "not even one sample"),
        ({"when": [{"epoch": 1, "upto": "blocks.1"}, {"epoch": 2, "upto": "blocks.0"}]}, "goes back"),
    ],
)
def test_bad_input_is_one_clear_error(options, says):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PassError, match=says) as caught:
        graphopt.compile(model, [Drop(**options)], input=(3, 8, 8), costs=False)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_misspelt_part_shows_the_nearest():
    with pytest.raises(SelectError, match=r"blocks\.1"):
        graphopt.compile(Small(), [Drop(upto="block.1")], input=(3, 8, 8), costs=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "say where the prefix ends"),
        ({"upto": "a", "probability": 0.5}, "probability is of mode = 'bypass'"),
        ({"mode": "bypass", "dtype": "float16"}, "dtype is of mode = 'prefix'"),
        ({"upto": "a", "folder": "x"}, 'folder is for cache = "disk"'),
        ({"upto": "a", "when": [{"epoch": 1, "upto": "b"}]}, "its own upto"),
        ({"mode": "bypass", "when": {"schedule": "progressive"}}, "give a probability"),
        ({"upto": "a", "dtype": "int8"}, "float32"),
        ({"upto": "a", "views": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense(options, says):
    with pytest.raises(pydantic.ValidationError, match=says):
        Drop(**options)


@pytest.mark.parametrize(
    "other",
    [Freeze(select=["blocks.0"]), Drop(upto="blocks.0")],
    ids=["freeze", "drop"],
)
def test_claims_that_contradict_each_other_surface_first(other):
    with pytest.raises(PassError, match="both claim"):
        graphopt.compile(Small(), [other, Drop(upto="blocks.2")], input=(3, 8, 8), costs=False)


def test_freeze_behind_the_cut_composes():
    passes = [Drop(upto="blocks.0"), Freeze(select="blocks.1")]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), verify="full", costs=False)
    assert {n.split(".")[1] for n, p in plan.module.named_parameters() if p.requires_grad and n.startswith("blocks")} == {"2", "3"}


def test_a_parameter_on_both_sides_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.fc(self.second(self.first(x).relu()).relu())

    with pytest.raises(PassError, match=r"first.weight is read before the cut and behind it \(as second.weight\)"):
        graphopt.compile(Tied(), [Drop(upto="first")], input=(6,), costs=False)


def test_a_dropped_network_compiles():
    plan = graphopt.compile(Small(drop=0.5), [Drop(upto="blocks.1")], input=(3, 8, 8), costs=False)
    plan.module.train()
    x = torch.rand(4, 3, 8, 8)
    features = plan.prefix(x)
    assert torch.allclose(torch.compile(plan.prefix, backend="eager")(x), features)
    torch.manual_seed(3)
    expected = plan.suffix(features)
    torch.manual_seed(3)
    assert torch.allclose(torch.compile(plan.suffix, backend="eager")(features), expected, atol=1e-5)


def test_no_cache_needs_no_features():
    plan = graphopt.compile(Small(), [Drop(upto="blocks.1", cache="none")], input=(3, 8, 8), costs=False)
    assert plan.needs.features is None
    assert not plan.module.get_parameter("stem.weight").requires_grad


def test_check_says_what_each_drop_point_keeps():
    graph = trace(cifar.build("resnet20"), (3, 16, 16))
    value = Drop(when={"score": "change"}, dtype="float16")
    notes = value.match(graph).diagnostics
    assert len(notes) == 9
    assert "64x4x4 features: 2.00 KiB a sample in float16" in str(notes[-1])


# -- bypass -------------------------------------------------------------------------------------------------------------------------
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
    skipped = {n.where: n.why for n in plan.report.passes[0].notes if n.level == "skip"}
    assert set(skipped) == {"layer2.0", "layer3.0"}
    assert "(16, 8, 8) goes in, (32, 4, 4) comes out" in skipped["layer2.0"]


def test_nothing_to_bypass_is_an_error():
    with pytest.raises(PassError, match="not shape-preserving"):
        graphopt.compile(cifar.build("resnet20"), [Drop(mode="bypass", select="layer2.0")], input=(3, 8, 8), costs=False)


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
