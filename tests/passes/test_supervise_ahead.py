"""Auxiliary networks of the blocks that follow: which blocks, what they compute, whose weights they follow, and where they go."""

from __future__ import annotations

import copy
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.cost import forecast
from graphopt.cost.partition import BATCH
from graphopt.errors import PassError
from graphopt.ir.partition import cut_candidates
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.passes.supervise.ahead import Adapter, ahead_blocks, depth_of, evenly, following
from graphopt.passes.supervise.layout import ActivationLayout
from tests.passes.supervise_backbones import BACKBONES
from tests.passes.supervise_steps import compiled, step
from tests.support.backbones import Residual, Small

CUTS = ("blocks.0", "blocks.1")
AHEAD: dict[str, Any] = {"decoder": "none", "head": "ahead"}
LOOK: dict[str, Any] = {"decoder": "none", "lookahead": {"ema": 0.75}}


def auxiliary(plan: graphopt.Plan, index: int = 0) -> Any:
    return plan.module.get_submodule(f"supervise.{index}")


def backward(module: nn.Module) -> None:
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    output, local = module(x, y)
    (F.cross_entropy(output, y) + local).backward()


# -- which blocks ---------------------------------------------------------------------------------------------------------------
def test_depths_and_blocks_are_those_of_the_paper() -> None:
    """AugLocal's rule for ResNet-32 in fourteen modules: depth 2, tapered by half, of the sixteen units that it counts."""
    graph = graphopt.trace(cifar.build("resnet32"), (3, 8, 8), compare=False)
    stem = next(n for n in graph.nodes if n.name == "relu")
    assert [depth_of(2, 0.5, i, 13) for i in range(13)] == [max(1, round(2 * (1 - i / 24) + i / 24)) for i in range(13)]
    assert [depth_of(4, 1.0, i, 3) for i in range(3)] == [4, 2, 1]
    assert [b.name for b in ahead_blocks(graph, stem, 2)] == ["layer2.2", "layer3.4"]
    last = following(graph, stem)[-3].exits[0]
    assert [b.name for b in ahead_blocks(graph, last, 5)] == ["layer3.3", "layer3.4"]
    assert [b.name for b in evenly(following(graph, stem), 3)] == ["layer1.4", "layer2.4", "layer3.4"]


def test_what_no_block_follows_is_refused() -> None:
    with pytest.raises(PassError, match=r"no block that can stand alone follows.*Cut"):
        compiled(Small(), Supervise(cuts=("blocks.3",), **AHEAD))
    with pytest.raises(PassError, match=r"1 blocks that can stand alone follow .* asks for 2"):
        compiled(Small(), Supervise(cuts=("blocks.2",), decoder="none", lookahead={"blocks": 2}))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", ["vit", "swin, timm", "mobilenet"])
def test_families_train_and_export_their_own_state(name: str) -> None:
    make, input = BACKBONES[name]
    torch.manual_seed(0)
    model = make()
    for options in (AHEAD, {"lookahead": {"bias": "block"}}, {"head": "dictionary"}):
        plan = compiled(model, Supervise(modules=3, **options), input, verify="fast")
        found = step(plan, input)
        assert all(g is not None and g.isfinite().all() for g in found.values()), options
        assert type(plan.export()) is type(model)
        assert plan.export_state().keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", [AHEAD, {"lookahead": {}}])
def test_cuts_by_memory_count_the_copies(options: dict[str, Any]) -> None:
    model = cifar.build("resnet8")
    value = Supervise(modules=2, balance="memory", taper=0.0, **options)
    graph = graphopt.trace(model, (3, 8, 8), compare=False)
    table = value.peaks(graph)
    plan = compiled(model, value, (3, 8, 8))
    (cut,) = plan.report.passes[0].figures["cuts"]
    at = [c.label for c in cut_candidates(graph)].index(cut)
    predicted = max(table[0, at], table[at + 1, len(table) - 1])
    assert forecast(plan.module, (3, 8, 8), BATCH, targets=True).peak_activation_bytes == pytest.approx(predicted, rel=0.02)


# -- ahead ----------------------------------------------------------------------------------------------------------------------
def test_fresh_weights_have_the_values_of_the_block_in_another_order() -> None:
    torch.manual_seed(0)
    model = Small(drop=0.5)
    plan = compiled(model, Supervise(cuts=CUTS, depth=1, **AHEAD))
    found = dict(auxiliary(plan).head.blocks.named_parameters())
    own = dict(model.blocks[3].named_parameters())
    assert len(found) == len(own)
    for name, parameter in own.items():
        copied = next(p for n, p in found.items() if n.endswith(f"blocks.3.{name}"))
        assert torch.equal(copied.flatten().sort().values, parameter.flatten().sort().values)
        assert torch.equal(copied, parameter) == (parameter.dim() == 1)  # of norms: ones and zeros
    other = dict(auxiliary(plan, 1).head.blocks.named_parameters())
    assert any(not torch.equal(a, b) for a, b in zip(found.values(), other.values(), strict=True))


def test_copies_draw_nothing() -> None:
    """The backbone's dropout masks are those that it draws without auxiliary parts."""
    model, x = Small(drop=0.5), torch.rand(4, 3, 8, 8)
    torch.manual_seed(1)
    expected = copy.deepcopy(model).train()(x)
    for options in (AHEAD, LOOK):
        module = compiled(model, Supervise(cuts=CUTS, **options)).module.train()
        torch.manual_seed(1)
        assert torch.equal(module(x, torch.arange(4))[0], expected)


SHAPES = [
    (ActivationLayout(1, 3, 64, (8, 8), 0, 4), (3, 8, 8)),
    (ActivationLayout(3, 5, 16, (4, 4), 0, 4), (4, 4, 5)),
    (ActivationLayout(2, 4, 17, (4, 4), 1, 3), (17, 4)),
    (ActivationLayout(1, 6, 1, (1, 1), 0, 2), (6,)),
]


@pytest.mark.parametrize(("source", "given"), SHAPES)
@pytest.mark.parametrize(("goal", "wanted"), SHAPES)
def test_an_adapter_gives_every_layout(source: Any, given: tuple[int, ...], goal: Any, wanted: tuple[int, ...]) -> None:
    assert Adapter(source, goal)(torch.rand(2, *given)).shape == (2, *wanted)


def test_an_adapter_keeps_constants_and_averages_positions() -> None:
    source, goal = SHAPES[0][0], ActivationLayout(2, 3, 17, (4, 4), 1, 3)
    x = torch.rand(2, 3, 8, 8)
    found = Adapter(source, goal)(x)
    torch.testing.assert_close(found[:, 1:].mean(1), x.mean((2, 3)))
    torch.testing.assert_close(found[:, 0], x.mean((2, 3)))


# -- look-ahead -----------------------------------------------------------------------------------------------------------------
def test_the_mean_follows_the_next_modules_weights_step_by_step() -> None:
    model = Small(drop=0.0)
    plan = compiled(model, Supervise(cuts=CUTS, **LOOK))
    module = plan.module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    weight = module.get_parameter("blocks.1.conv1.weight")  # the first block of module 2
    expected, lookahead = weight.detach().clone(), module.get_submodule("supervise.0.lookahead")
    mean = next(n for n, _ in lookahead.named_buffers() if n.endswith("blocks.1.conv1.weight"))
    for _ in range(3):
        backward(module)
        expected = expected.lerp(weight.detach(), 0.25)
        torch.testing.assert_close(lookahead.get_buffer(mean), expected)
        optimizer.step()
    assert not torch.equal(expected, weight)
    assert not any(".mean." in n for n, _ in module.named_parameters())
    assert f"supervise.0.lookahead.{mean}" in module.state_dict()


def test_a_copy_and_a_loaded_state_go_on_as_the_module_does() -> None:
    plan = compiled(Small(drop=0.0), Supervise(cuts=CUTS, **LOOK))
    module = plan.module.train()
    backward(module)
    copied, loaded = copy.deepcopy(module), copy.deepcopy(compiled(Small(drop=0.0), Supervise(cuts=CUTS, **LOOK)).module).train()
    loaded.load_state_dict(module.state_dict())
    with torch.no_grad():
        for one in (module, copied, loaded):
            one.get_parameter("blocks.1.conv1.weight").mul_(2)
    for one in (module, copied, loaded):
        torch.manual_seed(2)
        backward(one)
    for other in (copied, loaded):
        for (name, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("bias", ["none", "block", "scale"])
def test_the_output_is_the_mean_and_the_copy(bias: Any) -> None:
    plan = compiled(Small(drop=0.0), Supervise(cuts=CUTS, decoder="none", lookahead={"bias": bias}))
    lookahead = auxiliary(plan).lookahead
    block, h = Residual(8), torch.rand(2, 8, 8, 8)
    block.load_state_dict({k.removeprefix("blocks.1."): v for k, v in plan.module.state_dict().items() if k.startswith("blocks.1.")})
    out = block.train()(h)
    if bias == "scale":
        with torch.no_grad():
            lookahead.scale.fill_(0.5)
    torch.testing.assert_close(lookahead.train()(h), out * (1 if bias == "none" else 2))
    assert {n for n, _ in lookahead.named_parameters()} >= ({"scale"} if bias == "scale" else set())


# -- beside other passes --------------------------------------------------------------------------------------------------------
BESIDE: list[list[Any]] = [
    [Freeze(select=["stem", "blocks.0"])],
    [Freeze(select=["blocks.1"])],
    [Checkpoint(segments=3)],
    [Factorize(select="blocks.1", rank=2)],
    [Drop(mode="bypass", select=["blocks.2"], probability=0.5)],
]


@pytest.mark.parametrize("options", [AHEAD, LOOK], ids=["ahead", "lookahead"])
@pytest.mark.parametrize("others", BESIDE, ids=["freeze a module", "freeze the next", "checkpoint", "factorize the next", "bypass"])
@pytest.mark.parametrize("first", [True, False])
def test_beside_other_passes(options: Any, others: list[Any], first: bool) -> None:
    own = Supervise(cuts=CUTS, **options)
    plan = compiled(Small(drop=0.0), [own, *others] if first else [*others, own], verify="full")
    found = step(plan)
    trains = {n for n, p in plan.module.named_parameters() if p.requires_grad}
    assert {n for n, g in found.items() if g is not None} == trains
    assert any(n.startswith("supervise.") for n in trains)


# -- options --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [{"blocks": 0}, {"ema": 1.0}, {"bias": "both"}, {"decay": 0.9}])
def test_options_that_lookahead_does_not_take(value: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Supervise(modules=2, lookahead=value)


def test_a_dictionary_is_the_mean_similarity_of_positions() -> None:
    plan = compiled(Small(drop=0.0), Supervise(cuts=CUTS, decoder="none", head="dictionary", temperature=0.5))
    part, h, y = auxiliary(plan).double(), torch.rand(4, 8, 8, 8, dtype=torch.float64), torch.arange(4)
    similar = torch.einsum("nchw,kc->nhwk", h, part.head.embeddings).flatten(1, 2).mean(1) / 0.5
    torch.testing.assert_close(part(h, None, y), F.cross_entropy(similar, y))
    assert [n for n, _ in part.named_parameters()] == ["head.embeddings"]
