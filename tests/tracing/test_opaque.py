"""Modules that cannot be traced, that check, count or checkpoint by themselves, or that come from libraries, as parts of a backbone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt import TraceError, trace
from graphopt.cost import forecast
from graphopt.ir.blocks import find_blocks
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from tests.tracing import nets
from tests.tracing.nets import SHAPE, Net


class ByValue(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean().item() > 0.5 else x + self.conv(x)


class Drawing(ByValue):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if random.random() < 0.5 else x


class AnyValue(ByValue):
    def forward(self, x: Tensor) -> Tensor:
        if (x > 100).any():
            x = x * 2
        return self.conv(x)


class Counts(ByValue):
    """Assigns a number to its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.conv(x)


class Averages(Counts):
    """Assigns another tensor to its buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps = 0.9 * self.steps + 0.1 * x.mean().detach()
        return self.conv(x)


class MovesInTraining(Counts):
    """Moves its buffer in training only."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            self.steps.mul_(0.9).add_(y.mean().detach())
        return y


class MovesAViewInTraining(Counts):
    """The same, through a view, and before it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps.detach()[None].copy_(x.mean()[None])
        return self.conv(x)


class Casts(ByValue):
    """Keeps its own arithmetic out of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.conv(x) + x


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ByValue, "control flow"),
        (Casts, "sets autocast"),
        (MovesInTraining, "depends on the mode"),
        (MovesAViewInTraining, "depends on the mode"),
        (AnyValue, "control flow"),
        (Drawing, "draws from Python's random generator"),
        (Counts, "assigns to its own buffers"),
        (Averages, "assigns to its own buffers"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_what_cannot_be_traced_is_one_opaque_leaf_and_the_model_stays_as_it_was(block: type[nn.Module], reason: str) -> None:
    model = Net(block)
    before, modules = copy.deepcopy(model.state_dict()), {path: dict(vars(m)) for path, m in model.named_modules()}
    graph = trace(model, SHAPE)
    assert [(o.path, reason in o.reason) for o in graph.opaque] == [(f"blocks.{i}", True) for i in range(3)]
    assert len(find_blocks(graph)) == 3
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == modules
    assert all(type(v) is Tensor and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    class Root(Averages):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return super().forward(x).mean((2, 3))

    model = Root()
    attributes = dict(vars(model))
    with pytest.raises(TraceError, match="assigns to its own buffers"):
        trace(model, (8, 4, 4))
    assert vars(model) == attributes
    assert all(type(b) is Tensor for b in model.buffers())


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_what_has_no_gradient_in_the_backbone_has_none_in_the_graph(how: str) -> None:
    class WithoutGradient(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(how != "no_grad"):
                x = self.stem(x)
            return self.fc(self.blocks(x.detach() if how == "detach" else x).mean((2, 3)))

    plan = graphopt.compile(WithoutGradient(Checkpointing), Freeze(select="blocks.0"), input=SHAPE)
    assert plan.report.unused == ("stem.weight", "stem.bias")
    plan.module.train()(torch.rand(2, *SHAPE)).sum().backward()
    assert {n for n, p in plan.module.named_parameters() if p.grad is None and p.requires_grad} == {"stem.weight", "stem.bias"}


def test_a_dataclass_as_output() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        features: Tensor

    class Returning(Net):
        def forward(self, x: Tensor) -> Output:
            x = self.blocks(self.stem(x))
            return Output(self.fc(x.mean((2, 3))), x)

    model = Returning(Checkpointing)
    for value in (Freeze(select="stem"), Supervise(balance="memory", classes=5)):
        plan = graphopt.compile(model, value, input=SHAPE)
        assert plan.report.after is not None
    x = torch.rand(2, *SHAPE)
    found, expected = plan.module.eval()(x), model.eval()(x)
    assert type(found) is Output
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.features, expected.features)


def test_lazy_and_scripted_modules() -> None:
    with pytest.raises(TraceError, match="has no shape yet"):
        trace(Net(lambda: nn.LazyConv2d(8, 1)), SHAPE)
    with pytest.raises(TraceError, match=r"blocks\.0 is a scripted module with parameters"):
        trace(Net(lambda: torch.jit.script(nn.Conv2d(8, 8, 1))), SHAPE)
    model = Net(lambda: torch.jit.script(nn.ReLU()))
    x = torch.rand(2, *SHAPE)
    assert torch.equal(trace(model, SHAPE).module.eval()(x), model.eval()(x))


def test_the_layers_of_a_transformer_encoder_are_its_blocks() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    graph = trace(Encoder(), SHAPE)
    assert [b.name for b in find_blocks(graph)] == [f"encoder.layers.{i}" for i in range(3)]


class Checkpointing(nn.Module):
    """A residual block under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.norm(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class BoundCheckpoint(Checkpointing):
    """As Hugging Face does it: options are bound, and the function is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.checkpoint(functools.partial(self.body), x)


def timm_model(name: str, **arguments: Any) -> nn.Module:
    model = timm.create_model(name, **arguments)
    model.set_grad_checkpointing(True)
    return model


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Net(Checkpointing), SHAPE),
        (lambda: Net(BoundCheckpoint), SHAPE),
        (lambda: timm_model("test_vit", img_size=32), (3, 32, 32)),
        (lambda: timm_model("resnet18"), (3, 64, 64)),
    ],
    ids=["own", "bound", "vit", "resnet"],
)
def test_a_backbone_s_own_checkpointing_is_kept(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = build()
    plan = graphopt.compile(model, [], input=shape, batch=4)
    assert all(s.name.startswith("backbone_checkpoint_") for s in plan.base.sections)
    assert plan.report.before is not None
    assert plan.report.before.saved_activation_bytes == forecast(model, shape, 4).saved_activation_bytes
    x = torch.rand(2, *shape)
    torch.manual_seed(1)
    expected = copy.deepcopy(model).train()(x)
    torch.manual_seed(1)
    assert torch.equal(plan.module.train()(x), expected)


class Asserting(ByValue):
    """Looks at its channels, and takes keywords that nobody gives."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        assert x.shape[1] == 8
        assert not options
        return x + self.conv(x)


def test_blocks_that_check_their_channels_trace() -> None:
    graph = trace(Net(Asserting), SHAPE)
    assert graph.opaque == ()
    assert [b.name for b in find_blocks(graph)] == [f"blocks.{i}" for i in range(3)]


class UsesPart(ByValue):
    """An opaque block with a parameter that it does not use here."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x: Tensor, masked: bool = False) -> Tensor:
        return super().forward(x * self.mask if masked else x)


def test_what_an_opaque_module_does_not_use_is_reported_and_no_failure_of_a_pass() -> None:
    plan = graphopt.compile(Net(UsesPart), Freeze(select="stem"), input=SHAPE)
    assert plan.report.unused == tuple(f"blocks.{i}.mask" for i in range(3))


def test_functions_of_einops_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def rearrange(tensor: Tensor, pattern: str) -> Tensor:
        assert issubclass(type(tensor), Tensor), "einops finds a tensor's library by its type"
        return tensor.transpose(2, 3) if pattern == "b c h w -> b c w h" else tensor

    einops = types.ModuleType("einops")
    einops.rearrange = rearrange
    monkeypatch.setitem(sys.modules, "einops", einops)
    # As `from einops import rearrange` would, where the backbone's forward is.
    monkeypatch.setattr(nets, "rearrange", rearrange, raising=False)
    model = Net(look=lambda x: nets.rearrange(x, "b c h w -> b c w h"))
    graph = trace(model, SHAPE)
    assert graph.opaque == ()
    x = torch.rand(2, *SHAPE)
    assert torch.equal(graph.module.eval()(x), model.eval()(x))


def test_maps_no_larger_than_the_window_of_a_video_swin() -> None:
    sizes = {"patch_size": [2, 4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [8, 7, 7]}
    model = torchvision.models.video.SwinTransformer3d(num_classes=5, **sizes)
    plan = graphopt.compile(model, Freeze(select="features.0"), input=(3, 4, 32, 32), costs=False)
    assert plan.base.opaque == ()
    x = torch.rand(2, 3, 4, 32, 32)
    assert torch.equal(plan.module.eval()(x), model.eval()(x))


def test_a_module_under_two_names_is_known_by_either() -> None:
    model = Net(Checkpointing)
    model.blocks[2] = model.blocks[0]
    for name in ("blocks.0", "blocks.2"):
        plan = graphopt.compile(model, Freeze(select=name), input=SHAPE, costs=False)
        frozen = {n for n, p in plan.module.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in model.named_parameters() if n.startswith("blocks.0.")}
    both = graphopt.compile(model, Freeze(select="blocks.*"), input=SHAPE, costs=False)
    assert {n for n, p in both.module.named_parameters() if p.requires_grad} == {"stem.weight", "stem.bias", "fc.weight", "fc.bias"}


def test_a_leaf_that_returns_a_library_s_dictionary() -> None:
    class Output(dict[str, Tensor]):
        def __getattr__(self, name: str) -> Tensor:
            return self[name]

    class Leaf(ByValue):
        def forward(self, x: Tensor) -> Output:
            return Output(last=super().forward(x))

    class Reading(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).last
            return self.fc(x.mean((2, 3)))

    model = Reading(Leaf)
    graph = trace(model, SHAPE)
    assert len(graph.opaque) == 3
    x = torch.rand(2, *SHAPE)
    assert torch.equal(graph.module.eval()(x), model.eval()(x))


def test_a_gradient_that_is_zero_by_nature_is_no_failure() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2)
            return x + scores.softmax(-1) @ self.value(x)

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
            self.blocks = nn.Sequential(*(Attention() for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    for value in (Freeze(select="blocks.1"), Freeze(select=("patch", "blocks.0"))):
        graphopt.compile(Patches(), value, input=SHAPE, costs=False)


def test_a_weight_that_is_asked_for_its_type_only_is_not_read() -> None:
    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            wanted = self.stem.weight.dtype
            return super().forward(x if x.dtype == wanted else x.to(wanted))

    graph = trace(Asking(), SHAPE)
    assert not graph.fx.find_nodes(op="get_attr", target="stem.weight")
    plan = graphopt.compile(Asking(Checkpointing), Drop(upto="blocks.0"), input=SHAPE, costs=False)
    assert plan.needs.features is not None
