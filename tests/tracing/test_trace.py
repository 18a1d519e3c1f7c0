"""One graph for both modes, equal to the backbone in every bit and every key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import graphopt
from graphopt import TraceError, trace
from graphopt.passes.freeze import Freeze
from graphopt.tracing.equivalence import same, untouched
from tests.support import backbones

Factory = Callable[[], nn.Module]

EXACT: list[tuple[str, Factory, tuple[int, ...], int]] = [
    # name, factory, input, opaque leaves expected
    ("own residual with functional dropout", backbones.Small, (3, 8, 8), 0),
    ("own with an untraceable child", backbones.Hollow, (3, 8, 8), 1),
    ("own with mode-dependent structure", backbones.Modes, (3, 8, 8), 1),
    ("own with an auxiliary output", backbones.Auxiliary, (3, 8, 8), 0),
    ("one module called twice", backbones.Twice, (3, 8, 8), 0),
    ("own in float64", lambda: backbones.Small().double(), (3, 8, 8), 0),
    ("torchvision resnet18", torchvision.models.resnet18, (3, 32, 32), 0),
    ("torchvision densenet121", lambda: torchvision.models.densenet121(drop_rate=0.2), (3, 32, 32), 0),
    ("torchvision efficientnet_b0", torchvision.models.efficientnet_b0, (3, 32, 32), 0),
    ("torchvision vit", lambda: torchvision.models.vit_b_32(image_size=32, dropout=0.1), (3, 32, 32), 0),
    ("torchvision swin_t", torchvision.models.swin_t, (3, 64, 64), 0),
    ("torchvision googlenet", lambda: torchvision.models.googlenet(init_weights=False), (3, 64, 64), 0),
    ("timm vit", lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, attn_drop_rate=0.1, drop_path_rate=0.1), (3, 32, 32), 0),
    (
        "timm swin",
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, drop_path_rate=0.2),
        (3, 64, 64),
        0,
    ),
    ("timm convnext", lambda: timm.create_model("convnext_atto", drop_path_rate=0.2), (3, 32, 32), 0),
]


@pytest.mark.parametrize(("factory", "shape", "count"), [c[1:] for c in EXACT], ids=[c[0] for c in EXACT])
def test_output_and_keys_are_the_backbones_in_both_modes_and_only_what_must_stays_opaque(
    factory: Factory, shape: tuple[int, ...], count: int
) -> None:
    model = factory()
    graph = trace(model, shape)
    assert len(graph.opaque) == count
    for leaf in graph.opaque:
        assert leaf.reason
        assert any(n.op == "call_module" and n.target == leaf.path for n in graph.nodes)
    assert list(graph.module.state_dict()) == list(model.state_dict())
    assert dict(graph.module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    x = torch.rand(3, *shape, dtype=next(model.parameters()).dtype)  # not the batch it was traced or compared with
    for training in (True, False):
        outputs = []
        for module in (model, graph.module):
            module.train(training)
            with untouched(model, seed=5):
                outputs.append(module(x))
        assert same(*outputs)


def test_every_node_has_an_origin_and_a_shape() -> None:
    graph = trace(backbones.Twice(), (3, 8, 8))
    for node in graph.nodes:
        assert "origin" in node.meta
        assert node.op == "output" or "val" in node.meta
    calls = {n.meta["origin"].call for n in graph.nodes if n.meta["origin"].path.startswith("same.conv1")}
    assert calls == {0, 1}


def test_unused_parameters_are_kept_and_reported() -> None:
    model = backbones.Hollow()
    graph = trace(model, (3, 8, 8))
    assert graph.unused == ("never",)
    model.load_state_dict(graph.module.state_dict(), strict=True)


def test_the_backbone_is_left_as_it_was() -> None:
    model = backbones.Small()
    model.eval()
    model.blocks[1].train()
    modes = {n: m.training for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(model.__dict__), set(model._buffers)
    trace(model, (3, 8, 8))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert (set(model.__dict__), set(model._buffers)) == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_hooks_that_a_forward_installs_once_are_there_once() -> None:
    class Collecting(backbones.Small):
        """Collects the outputs of its blocks by hooks, which its first forward installs."""

        installed = False

        def forward(self, x: Tensor) -> Tensor:
            self.states: list[Tensor] = []
            if not self.installed:
                for block in self.blocks:
                    block.register_forward_hook(lambda module, given, output: self.states.append(output))
                self.installed = True
            return super().forward(x) + self.states[1].mean()

    model = Collecting()
    expected = Collecting()
    expected.load_state_dict(model.state_dict())
    graph = trace(model, (3, 8, 8))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    assert torch.equal(graph.module.eval()(x), expected(x))
    assert [len(block._forward_hooks) for block in model.blocks] == [len(block._forward_hooks) for block in expected.blocks]


class RootBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.mean() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


REFUSED = [
    (RootBranches, (3,), "a module of its own"),
    (TwoInputs, (3,), "2 required inputs"),
    (torchvision.models.resnet18, (1, 32, 32), "Give the input shape"),
    (lambda: torchvision.models.vit_b_32(image_size=64), (3, 32, 32), "Give the input shape"),
]


@pytest.mark.parametrize(("factory", "shape", "says"), REFUSED)
def test_what_cannot_be_one_graph_is_one_clear_error(factory: Factory, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(factory(), shape)


def test_compiling_records_gradients_in_every_mode_of_the_caller() -> None:
    backbone = backbones.Small()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            graphopt.compile(backbone, Freeze(select="stem"), input=(3, 8, 8))
    with torch.inference_mode(), pytest.raises(TraceError, match=r"weight was made in torch\.inference_mode"):
        trace(backbones.Small(), (3, 8, 8))


def test_a_training_graph_is_never_pickled(tmp_path) -> None:
    with pytest.raises(TypeError, match="state dict"):
        torch.save(trace(backbones.Small(), (3, 8, 8)).module, tmp_path / "module.pt")


@pytest.mark.parametrize("name", ["meta", "graph", "code", "class", 'a"b', "a'b", "a\\b", "a\nb"])
def test_a_name_that_code_cannot_hold_is_refused_by_name(name: str) -> None:
    module = nn.Sequential()
    module.add_module(name, nn.Conv2d(3, 3, 1))
    with pytest.raises(TraceError, match="cannot be called"):
        trace(module, (3, 4, 4))


def test_names_that_are_no_identifiers_trace() -> None:
    module = nn.Sequential()
    for name in ("0", "a-b", "a b", "é", "match"):
        module.add_module(name, nn.Conv2d(3, 3, 1))
    assert {"a-b", "a b"} <= set(trace(module, (3, 4, 4)).paths)


def test_inputs_beyond_memory_are_refused_before_memory_is_taken() -> None:
    for shape in ((1, 2**31 - 1, 16), (3, 10**6, 10**6), (1, 10**30, 32), (1, 2**63 - 1, 16), (3, 0, 4), (3, -1, 4)):
        with pytest.raises(TraceError, match="one sample of shape"):
            trace(backbones.Small(), shape)
    wide = nn.Sequential(nn.Conv2d(1, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(TraceError, match="on two samples takes"):
        trace(wide, (1, 8000, 8000))


def test_parameters_without_a_gradient_are_found_without_activations() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one(x).sigmoid().detach() * self.two(x).sigmoid()).mean((2, 3))

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert set(trace(Detached(), (3, 8, 8)).unused) == {"one.weight", "one.bias"}
    assert saved
    assert all(isinstance(t, FakeTensor) for t in saved)


def test_parameters_of_what_nothing_reads_are_found() -> None:
    class Aside(nn.Module):
        """An auxiliary head and a token whose outputs are thrown away, a bias that is added in place, and one that orders only."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.aside = nn.Conv2d(3, 4, 1), nn.Linear(4, 5), nn.Linear(4, 3)
            self.token, self.bias, self.order = (nn.Parameter(torch.zeros(4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x).mean((2, 3))
            y.add_(self.bias)
            self.aside(y + self.token)
            y = y.gather(1, (y + self.order).argsort(1))
            return self.head(y)

    model = Aside()
    assert set(trace(model, (3, 8, 8)).unused) == {"token", "order", "aside.weight", "aside.bias"}
    plan = graphopt.compile(model, [Freeze(select="stem")], input=(3, 8, 8), verify="full")
    assert set(plan.report.unused) == {"token", "order", "aside.weight", "aside.bias"}
