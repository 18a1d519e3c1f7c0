"""drop: a prefix leaves training, and the suffix trains on what it computed."""

from __future__ import annotations

import copy

import pydantic
import pytest
import torch
import torchvision
from torch import nn

import graphopt
from graphopt import trace
from graphopt.compiler.triggers import Decision
from graphopt.errors import PassError, SelectError
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from tests.passes.drop.networks import BACKBONES
from tests.support.backbones import Small


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


def test_a_prefix_stays_in_eval_mode_whatever_train_says():
    plan = graphopt.compile(Small(drop=0.5), [Drop(upto="blocks.1")], input=(3, 8, 8), costs=False)
    before = {k: v.clone() for k, v in plan.module.state_dict().items()}
    plan.module.train()
    x = torch.rand(4, 3, 8, 8)
    loss = plan.module(x).square().mean()
    loss.backward()
    assert torch.equal(plan.prefix(x), plan.prefix(x)), "no dropout"
    after = plan.module.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[1] for k in moved} == {"2", "3"}, "statistics after the cut move, those of the prefix do not"
    with_gradient = {n for n, p in plan.module.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in plan.module.named_parameters() if p.requires_grad}
    assert all(n.startswith(("blocks.2", "blocks.3", "fc")) for n in with_gradient)


def test_training_on_features_is_training_the_whole():
    plan = graphopt.compile(Small(drop=0.0), [Drop(upto="blocks.0")], input=(3, 8, 8), costs=False)
    copied = graphopt.compile(copy.deepcopy(plan.backbone), [Drop(upto="blocks.0")], input=(3, 8, 8), costs=False)
    copied.module.load_state_dict(plan.module.state_dict())
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    features = plan.prefix(x)
    for whole, module, given in ((plan, plan.suffix, features), (copied, copied.module, x)):
        module.train()
        optimizer = torch.optim.SGD([p for p in whole.module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(given), y).backward()
            optimizer.step()
    states = plan.module.state_dict(), copied.module.state_dict()
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
    ("options", "message"),
    [
        ({"upto": "blocks.1.conv1"}, "not closed.*'blocks.0' and 'blocks.1'"),
        ({"upto": "fc"}, "head itself cannot be dropped.*'blocks'"),
        ({"upto": "blocks.1", "limit": "16 B"}, "smaller than one sample"),
        ({"when": [{"epoch": 1, "upto": "blocks.1"}, {"epoch": 2, "upto": "blocks.0"}]}, "goes back"),
    ],
)
def test_bad_input_is_one_clear_error(options, message):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PassError, match=message) as caught:
        graphopt.compile(model, [Drop(**options)], input=(3, 8, 8), costs=False)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_misspelt_part_shows_the_nearest():
    with pytest.raises(SelectError, match=r"blocks\.1"):
        graphopt.compile(Small(), [Drop(upto="block.1")], input=(3, 8, 8), costs=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say where the prefix ends"),
        ({"upto": "a", "probability": 0.5}, "probability: only valid with mode = 'bypass'"),
        ({"mode": "bypass", "dtype": "float16"}, "dtype: only valid with mode = 'prefix'"),
        ({"upto": "a", "folder": "x"}, 'folder: only valid with cache = "disk"'),
        ({"upto": "a", "when": [{"epoch": 1, "upto": "b"}]}, "its own upto"),
        ({"mode": "bypass", "when": {"schedule": "progressive"}}, "give a probability"),
        ({"upto": "a", "dtype": "int4"}, "float32"),
        ({"upto": "a", "views": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        Drop(**options)


@pytest.mark.parametrize(
    "other",
    [Freeze(select=["blocks.0"]), Drop(upto="blocks.0")],
    ids=["freeze", "drop"],
)
def test_claims_that_contradict_each_other_surface_first(other):
    with pytest.raises(PassError, match="both claim"):
        graphopt.compile(Small(), [other, Drop(upto="blocks.2")], input=(3, 8, 8), costs=False)


def test_freeze_after_the_cut_composes():
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

    with pytest.raises(PassError, match=r"first.weight is read before the cut and after it \(as second.weight\)"):
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


def test_a_match_reports_the_size_of_the_features_at_each_cut():
    graph = trace(cifar.build("resnet20"), (3, 16, 16))
    value = Drop(when={"score": "change"}, dtype="float16")
    notes = value.match(graph).diagnostics
    assert len(notes) == 9
    assert "64x4x4 features: 2.00 KiB per sample in float16" in str(notes[-1])


class CalledTwice(nn.Module):
    """One module between two layers and again after the second."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.shared, self.second, self.fc = nn.Linear(6, 6), shared, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.shared(self.second(self.shared(self.first(x)))))


def test_dropout_that_is_called_before_and_after_the_cut_stays_on_after_it():
    plan = graphopt.compile(CalledTwice(nn.Dropout(0.5)), [Drop(upto="second")], input=(6,), costs=False)
    plan.module.train()
    x = torch.rand(8, 6)
    assert torch.equal(plan.prefix(x), plan.prefix(x))
    assert not torch.equal(plan.suffix(plan.prefix(x)), plan.suffix(plan.prefix(x)))
    assert plan.report.passes[0].figures["always_eval"] == 1


def test_a_norm_with_state_on_both_sides_is_refused():
    with pytest.raises(PassError, match="shared is called before the cut and after it, and has buffers"):
        graphopt.compile(CalledTwice(nn.BatchNorm1d(6, affine=False)), [Drop(upto="second")], input=(6,), costs=False)


def test_a_prefix_that_draws_random_numbers_is_refused():
    class Noisy(Small):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    with pytest.raises(PassError, match="draws random numbers"):
        graphopt.compile(Noisy(drop=0.0), [Drop(upto="blocks.1")], input=(3, 8, 8), verify="off", costs=False)


def test_what_an_earlier_pass_has_frozen_does_not_train_after_the_cut():
    passes = [Freeze(select=["blocks.2", "blocks.3", "fc"]), Drop(upto="blocks.1")]
    with pytest.raises(PassError, match=r"nothing trainable is left after 'blocks\.1'"):
        graphopt.compile(Small(), passes, input=(3, 8, 8), costs=False)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("first", ["checkpoint", "drop"])
def test_checkpointed_segments_across_the_cut_are_divided(segments, first):
    passes = [Checkpoint(segments=segments), Drop(upto="blocks.1")]
    model = Small(drop=0.0)
    alone = graphopt.compile(copy.deepcopy(model), passes[1:], input=(3, 8, 8), costs=False)
    both = graphopt.compile(model, passes if first == "checkpoint" else passes[::-1], input=(3, 8, 8), costs=False)
    x, expected = torch.rand(4, 3, 8, 8), {}
    for plan, module, given in ((alone, alone.module, x), (both, both.module, x), (both, both.suffix, both.prefix(x))):
        plan.module.zero_grad()
        module.train()
        module(given).square().sum().backward()
        found = {n: p.grad for n, p in plan.module.named_parameters() if p.requires_grad}
        expected = expected or found
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in found)
