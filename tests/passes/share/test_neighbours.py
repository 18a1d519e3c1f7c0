"""Who shares with whom: the published arithmetic, and every way in which a neighbour can be no neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

import graphopt
from graphopt import GraphoptError, PassError, Plan, Severity
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.spec import from_table
from tests.passes.share.backbones import compiled


def shared(model: nn.Module, **options: Any) -> tuple[str, ...]:
    return compiled(model, verify="off", **options).report.passes[0].regions


def sources(plan: Plan, index: int = 0) -> dict[str, tuple[str, ...]]:
    effects = plan.effects[index]
    assert effects is not None
    return {name: status.sources for name, status in effects.statuses.items()}


def messages(plan: Plan, severity: Severity) -> dict[str, str]:
    return {d.location: d.message for d in plan.report.passes[0].diagnostics if d.severity == severity}


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return messages(compiled(model, verify="off", **options), Severity.SKIPPED)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- the published arithmetic ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("depth", "k", "blocks", "percent"),
    [(110, 4, 11, -21.3), (110, 3, 15, -28.0), (110, 2, 22, -39.4), (32, 2, 4, -21.7), (32, 4, 2, -4.9)],
)
def test_residual_networks(depth: int, k: int, blocks: int, percent: float) -> None:
    model = CifarResNet(depth)
    plan = compiled(model, verify="off", every=k)
    assert len(plan.report.passes[0].regions) == blocks
    # To the published digit, with a tenth of it for the scalars, which are not in the published figures.
    assert 100 * (parameters(plan.module) / parameters(model) - 1) == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize(("k", "blocks", "percent"), [(4, 2, -5.6), (2, 5, -13.9)])
def test_a_vision_transformer_by_its_attention(k: int, blocks: int, percent: float) -> None:
    model = models.vit_b_16()
    plan = compiled(model, (3, 224, 224), verify="off", every=k)
    assert len(plan.report.passes[0].regions) == blocks
    held = sum(p.numel() for n, p in model.named_parameters() if ".encoder_layer_" in n)
    assert held == pytest.approx(85.05e6, rel=1e-4)
    assert 100 * (parameters(plan.module) - parameters(model)) / held == pytest.approx(percent, abs=0.06)


def test_four_is_the_default_and_a_selection_is_taken_whole() -> None:
    assert Share().every == 4
    assert Share(select="layer1.1").every is None
    model = CifarResNet(32)
    assert shared(model) == shared(model, every=4) == ("layer1.3", "layer2.2")
    assert shared(model, select=("layer1.1", "layer3.2")) == ("layer1.1", "layer3.2")
    assert shared(model, select={"blocks": True, "path": "layer1"}, every=2) == ("layer1.1", "layer1.3")


def test_options_survive_toml() -> None:
    table = {"use": "share", "every": 3, "mode": "surrogate", "init": [0.7, 0.3], "norm": "mix", "scalars": "parameter", "detach": True}
    spec = from_table({"backbone": {"source": "cifar", "name": "resnet20"}, "pass": [table, {"use": "share", "select": "layer1.1"}]})
    again = from_table(spec.resolved())
    assert again == spec
    assert spec.passes[0].init == (0.7, 0.3)  # type: ignore[attr-defined]
    assert again.passes[1].every is None  # type: ignore[attr-defined]


# -- neighbours that are none ---------------------------------------------------------------------------------------------------
def test_other_shapes_are_skipped_with_the_reason() -> None:
    found = reasons(CifarResNet(20), every=1, select=("layer1.1", "layer1.2", "layer2.0"))
    assert "layer2.0 has other shapes (conv1.weight is 32x16x3x3, not 16x16x3x3)" in found["layer1.2"]
    assert found["layer2.0"].startswith("it has no neighbour whose weights it could use")


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        ("skip", ("layer1.1", "layer3.2")),
        # layer1.3 has layer1.2 before it and nothing of its shape after it; the same for layer2.1 the other way round.
        ("nearest", ("layer1.1", "layer3.2")),
        ("one-sided", ("layer1.1", "layer1.4", "layer2.1", "layer3.2")),
    ],
)
def test_boundaries(boundary: str, expected: tuple[str, ...]) -> None:
    chosen = ("layer1.1", "layer1.4", "layer2.0", "layer2.1", "layer3.2")
    assert shared(CifarResNet(32), select=chosen, boundary=boundary) == expected


def test_a_one_sided_block_is_its_neighbour_scaled() -> None:
    plan = compiled(CifarResNet(20), verify="full", select="layer1.0", boundary="one-sided")
    assert "layer1.0.share.b" in plan.module.state_dict()
    assert "layer1.0.share.a" not in plan.module.state_dict()
    assert plan.module.get_parameter("layer1.0.share.b").item() == 1.0
    assert torch.equal(plan.export_state()["layer1.0.conv1.weight"], plan.module.state_dict()["layer1.1.conv1.weight"])


def test_adjacent_blocks_pass_each_other_over() -> None:
    plan = compiled(CifarResNet(32), verify="off", select=("layer1.1", "layer1.2"))
    assert sources(plan) == dict.fromkeys(("layer1.1", "layer1.2"), ("layer1.0", "layer1.3"))
    why = "it uses the weights of layer1.0 and layer1.3: the blocks between cannot be its sources"
    assert messages(plan, Severity.NOTE)["layer1.1"] == why


def test_a_selected_block_that_is_skipped_serves_others() -> None:
    # layer1.0 has no block of its shapes before it, so it keeps its weights, and layer1.1 uses them.
    assert shared(CifarResNet(20), select=("layer1.0", "layer1.1")) == ("layer1.1",)


def test_blocks_that_are_frozen_in_the_backbone_are_no_sources() -> None:
    model = CifarResNet(32)
    model.layer1[2].requires_grad_(False)
    assert sources(compiled(model, verify="off", select="layer1.1")) == {"layer1.1": ("layer1.0", "layer1.3")}


def test_a_neighbour_frozen_by_a_pass_stays_the_source_in_every_order() -> None:
    share, freeze = Share(select="layer1.1"), Freeze(select="layer1.2")
    for passes in ([share, freeze], [freeze, share]):
        plan = graphopt.compile(CifarResNet(32), passes, input=(3, 8, 8), costs=False)
        assert sources(plan, passes.index(share)) == {"layer1.1": ("layer1.0", "layer1.2")}


def test_tied_weights_are_left_alone() -> None:
    model = CifarResNet(32)
    model.layer1[1].conv1.weight = model.layer1[3].conv1.weight
    with pytest.raises(PassError, match=r"layer1\.1\.conv1\.weight is one tensor with layer1\.3\.conv1\.weight"):
        shared(model, select="layer1.1")


def test_parts_of_blocks_use_the_same_parts() -> None:
    plan = compiled(CifarResNet(20), verify="full", select="layer1.1.conv2")
    assert "layer1.1.conv2.share.a" in plan.module.state_dict()
    assert "layer1.1.conv1.weight" in plan.module.state_dict()
    assert "layer1.1.conv2.weight" not in plan.module.state_dict()


# -- bad input ------------------------------------------------------------------------------------------------------------------
class Plain(nn.Module):
    """No repeated block at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: CifarResNet(20), {"every": 10}, "every = 10 takes none of the 9 blocks. Use at most 9"),
        (
            lambda: CifarResNet(8),
            {"every": 1},
            "none of the 3 selected blocks can be shared; the first: it has no neighbour whose weights it could use",
        ),
        (lambda: CifarResNet(20), {"parts": "attention"}, "it has no attention"),
        (lambda: CifarResNet(20), {"parts": "mlp"}, "it has no MLP"),
        (lambda: CifarResNet(20), {"select": "conv1"}, "neither a block nor part of one"),
        (lambda: CifarResNet(20), {"select": "layer1"}, "holds 3 blocks: select them one by one"),
        (lambda: CifarResNet(20), {"select": "layer1.1.bn1"}, "it has no parameters besides norms"),
        (lambda: CifarResNet(20), {"select": "layer9.*"}, "matches no path"),
        (lambda: CifarResNet(20), {"every": 2, "mode": "surrogate", "when": {"epoch": 1, "until": 2}}, "cannot be taken back at epoch 2"),
        (lambda: CifarResNet(20), {"select": "layer1.1.conv1", "mode": "surrogate"}, "a surrogate replaces a whole block"),
        (Plain, {}, "no repeated blocks"),
    ],
)
def test_one_clear_error(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message.replace("(", r"\(")) as caught:
        shared(model(), **options)
    assert "pass 1, share" in str(caught.value)


@pytest.mark.parametrize("options", [{"every": 0}, {"init": [0.5]}, {"mode": "both"}, {"k": 4}, {"boundary": "any"}])
def test_options_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Share(**options)


def test_everything_selected_leaves_the_ends_of_each_stage() -> None:
    found = reasons(CifarResNet(32), every=1)
    assert set(found) == {"layer1.0", "layer1.4", "layer2.0", "layer2.1", "layer2.4", "layer3.0", "layer3.1", "layer3.4"}


CHAIN = CifarResNet(38)
GRAPH = graphopt.trace(CHAIN, (3, 8, 8), compare=False)
NAMES = [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(6)]


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(["skip", "nearest", "one-sided"]))
def test_whatever_is_selected(chosen: set[str], boundary: Any) -> None:
    """Every selected block is shared or skipped with a reason; sources keep their weights, have the shapes, and are of the stage."""
    match = Share(select=tuple(sorted(chosen)), boundary=boundary).match(GRAPH)
    assert match.decision is not None
    skipped = {d.location for d in match.diagnostics if d.severity == Severity.SKIPPED}
    assert match.decision.keys() | skipped == chosen
    assert match.decision.keys() == set(match.names)
    for name, block in match.decision.items():
        assert match.decision.keys().isdisjoint(block.sources)
        assert all(s.split(".")[0] == name.split(".")[0] for s in block.sources)
        assert len(block.sources) == 2 or boundary == "one-sided"
        for tensor in block.tensors:
            assert len(tensor.sources) == len(block.sources)
            assert all(CHAIN.get_parameter(s).shape == CHAIN.get_parameter(tensor.name).shape for s in tensor.sources)
