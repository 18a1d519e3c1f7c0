"""The freeze pass against a plain frozen reference: what trains gets the same gradients, what is frozen does not move, less is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import graphopt
from graphopt.cost import forecast
from graphopt.errors import PassError
from graphopt.ir.regions import region_at
from graphopt.passes.freeze import Freeze
from graphopt.runtime.body import NoGrad
from tests.passes.freeze_backbones import CASES, below, built, compiled, gradients, plainly_frozen, saved_bytes, shared


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "stock"])
@pytest.mark.parametrize(("name", "selection", "paths"), CASES, ids=[f"{n}-{'+'.join(p[:2])}" for n, _, p in CASES])
def test_trains_as_a_plainly_frozen_model_does(name: str, selection: Any, paths: tuple[str, ...], lean: bool) -> None:
    model, shape = shared(name)
    reference = plainly_frozen(model, paths)
    module = compiled(model, selection, shape, lean=lean).module.double().train()
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(3, *shape, dtype=torch.float64)
    y, found = gradients(module, x)
    expected_y, expected = gradients(reference, x)
    assert torch.equal(y, expected_y)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        if gradient is None:
            assert found[key] is None, key
        else:
            assert (found[key] - gradient).abs().max() <= 1e-12 * max(gradient.abs().max(), expected_y.abs().max()), key
    assert saved_bytes(module, x) <= saved_bytes(reference, x)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        gradients(module, x)
        optimizer.step()
    for key, value in module.state_dict().items():
        if below(key, paths):
            assert torch.equal(value, before[key]), f"{key} moved"


@pytest.mark.parametrize(("name", "selection"), [("resnet10", "layer1"), ("functional", "body"), ("test_convnext", "stages.0")])
def test_every_promise_holds_in_numbers(name: str, selection: Any) -> None:
    model, shape = built(name)
    report = graphopt.compile(model, [Freeze(select=selection)], input=shape, costs=False).report.passes[0]
    assert {"eval output", "gradients of unselected parameters", "state-dict keys"} <= {c.property for c in report.verified}


@pytest.mark.parametrize(
    ("name", "selection", "share"),
    [
        ("resnet10", ["layer1", "layer2"], 0.64),
        ("functional", "body", 0.5),
        ("mobilenet_v3", ["features.1", "features.2", "features.3"], 0.9),
        ("test_convnext", "stages.0", 0.97),
    ],
)
def test_saves_less_than_plain_freezing_behind_a_trainable_stem(name: str, selection: Any, share: float) -> None:
    model, shape = built(name)
    paths = (selection,) if isinstance(selection, str) else tuple(selection)
    x = torch.randn(4, *shape, dtype=torch.float64)
    lean = saved_bytes(compiled(model, selection, shape).module.double().train(), x)
    assert lean < share * saved_bytes(plainly_frozen(model, paths), x)


# -- the prefix ---------------------------------------------------------------------------------------------------------------------
def test_the_prefix_is_cut_off_even_from_an_input_that_wants_a_gradient() -> None:
    model, shape = built("resnet10")
    plan = compiled(model, ["conv1", "bn1", "layer1"], shape)
    prefix = plan.module.get_submodule("sections.frozen_prefix")
    assert isinstance(prefix, NoGrad)
    x = torch.randn(2, *shape, requires_grad=True)
    assert not prefix(x).requires_grad
    plan.module.train()(x).sum().backward()
    assert x.grad is None
    assert [n.op for n in plan.module.graph.nodes][:3] == ["placeholder", "call_module", "call_module"]


def test_parameter_free_nodes_after_the_prefix_belong_to_it() -> None:
    model, shape = built("resnet10")
    plan = compiled(model, ["conv1", "bn1"], shape)
    section = plan.graph.sections[0]
    assert [n.name for n in section.nodes] == ["conv1", "bn1", "relu", "maxpool"]


def test_branches_without_trainable_parts_before_them_belong_to_it() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.a(x)) + self.b(x)).mean((2, 3))

    plan = compiled(Branches(), ["a", "c"], (3, 4, 4))
    assert [n.name for n in plan.graph.sections[0].nodes] == ["a", "c"]


def test_two_passes_make_one_prefix() -> None:
    model, shape = built("small")
    passes = [Freeze(select="stem"), Freeze(select="blocks.1"), Freeze(select="blocks.0")]
    plan = graphopt.compile(model, passes, input=shape, verify="full", costs=False)
    assert [s.name for s in plan.graph.sections] == ["frozen_prefix"]
    assert "blocks_1_conv2" in [n.name for n in plan.graph.sections[0].nodes]


class Outline(graphopt.Pass):
    """Another pass's section over a path."""

    name = "outline"
    select: str

    def match(self, graph: graphopt.Graph) -> graphopt.Match:
        return graphopt.Match((region_at(graph, self.select),))

    def rewrite(self, edit: graphopt.Editor, match: graphopt.ActiveMatch) -> graphopt.Effects:
        edit.outline(match.regions[0].nodes, NoGrad, "outline")
        return graphopt.Effects()


@pytest.mark.parametrize("outlined", ["blocks.0", "blocks.1", "blocks"])
def test_the_prefix_divides_where_another_section_does(outlined: str) -> None:
    model, shape = built("small")
    model.eval()
    passes = [Outline(select=outlined), Freeze(select=["stem", "blocks.0", "blocks.1", "blocks.2.conv1"])]
    plan = graphopt.compile(model, passes, input=shape, verify="off", costs=False)
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.equal(plan.module.double().eval()(x), copy.deepcopy(model).double()(x))


# -- thaw, triggers, the value ------------------------------------------------------------------------------------------------------
def test_thawing_gives_the_stock_graph_back() -> None:
    model, shape = built("resnet10")
    plan = compiled(model, "layer1", shape, when={"epoch": 1, "until": 3})
    stock = [(n.op, n.target) for n in plan.module.graph.nodes]
    frozen = plan.advance_to((*plan.decisions, *plan.due(1)))
    assert not frozen.module.get_parameter("layer1.0.conv1.weight").requires_grad
    assert type(frozen.module.get_submodule("layer1.0.bn1")) is not nn.BatchNorm2d
    thawed = frozen.advance_to((*frozen.decisions, *frozen.due(3)))
    assert [(n.op, n.target) for n in thawed.module.graph.nodes] == stock
    assert all(p.requires_grad for p in thawed.module.parameters())
    assert type(thawed.module.get_submodule("layer1.0.bn1")) is nn.BatchNorm2d
    assert type(thawed.module.get_submodule("layer1.0.conv1")) is nn.Conv2d


def test_export_gives_the_backbone_back() -> None:
    model, shape = built("resnet10")
    plan = compiled(model, ["layer1", "layer2"], shape)
    backbone = plan.export()
    assert type(backbone) is type(model)
    assert list(backbone.state_dict()) == list(model.state_dict())
    assert type(backbone.layer1[0].bn1) is nn.BatchNorm2d


def test_reads_and_writes_its_table() -> None:
    table = {"use": "freeze", "select": ["conv1", {"blocks": True, "first": 0.5}], "lean": False, "when": {"epoch": 3}}
    value = Freeze.model_validate({k: v for k, v in table.items() if k != "use"})
    assert value.table() == table


# -- what it says -------------------------------------------------------------------------------------------------------------------
def notes(model: nn.Module, selection: Any, shape: tuple[int, ...]) -> list[str]:
    return [str(n) for n in compiled(model, selection, shape).report.passes[0].diagnostics]


def test_says_what_an_open_prefix_costs_and_what_closes_it() -> None:
    model, shape = built("resnet10")
    (note,) = notes(model, ["layer1", "layer2"], shape)
    assert note.startswith("warning layer1: frozen, but conv1 and bn1 before it train")
    assert "Freeze conv1 and bn1 too" in note
    assert notes(model, ["conv1", "bn1", "layer1", "layer2"], shape) == []


def test_says_which_regions_have_nothing_to_freeze() -> None:
    model, shape = built("resnet10")
    assert notes(model, ["conv1", "bn1", "maxpool"], shape) == ["skipped maxpool: it has no parameters: nothing to freeze"]


@pytest.mark.parametrize(
    ("selection", "why"), [("**", "no trainable parameter would be left"), ("maxpool", "nothing that is selected has parameters")]
)
def test_refuses(selection: Any, why: str) -> None:
    model, shape = built("resnet10")
    with pytest.raises(PassError, match=why):
        compiled(model, selection, shape)
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_half_of_a_tied_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x)))

    with pytest.raises(PassError, match=r"shares its tensor with b\.weight"):
        compiled(Tied(), "a", (4,))
    assert not any(p.requires_grad for n, p in compiled(Tied(), ["a", "b"], (4,)).module.named_parameters() if "fc" not in n)


# -- where it runs ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("selection", [["conv1", "bn1", "layer1"], ["layer1"]], ids=["prefix", "behind"])
def test_compiles_whole_and_copies(selection: Any) -> None:
    model, shape = built("resnet10")
    module = compiled(model, selection, shape).module.double().train()
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected, gradient = gradients(module, x)
    copied = copy.deepcopy(module)
    y, again = gradients(copied, x)
    assert torch.equal(y, expected)
    assert all((a is None) == (b is None) for a, b in zip(gradient.values(), again.values(), strict=True))
    y, _ = gradients(torch.compile(copied, backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(y, expected)


def test_trains_under_ddp(tmp_path: Path) -> None:
    model, shape = built("resnet10")
    module = compiled(model, ["layer1", "layer2"], shape).module.double().train()
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = {n: None if g is None else g.clone() for n, g in gradients(module, x)[1].items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        found = {n.removeprefix("module."): g for n, g in gradients(wrapped, x)[1].items()}
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient)


def test_autocast_and_channels_last_give_finite_gradients() -> None:
    model, shape = built("resnet10")
    module = compiled(model, ["layer1", "layer2"], shape).module.train().to(memory_format=torch.channels_last)
    x = torch.randn(2, *shape).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


def test_figures_of_resnet50() -> None:
    """The figures to reach: front half of the blocks, with and without the stem."""
    model = torchvision.models.resnet50()
    shape = (3, 224, 224)
    base = forecast(model, shape, 2)

    def cost(*stem: str) -> Any:
        select = [*stem, {"blocks": True, "first": 0.5}]
        return forecast(graphopt.compile(model, [Freeze(select=select)], input=shape, verify="off", costs=False).module, shape, 2)

    closed, behind = cost("conv1", "bn1"), cost()
    assert closed.backward_flops <= 0.47 * base.backward_flops
    assert closed.saved_activation_bytes <= 0.27 * base.saved_activation_bytes
    assert behind.saved_activation_bytes <= 0.38 * base.saved_activation_bytes
