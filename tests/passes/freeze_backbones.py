"""Backbones of the tests of freeze, what is frozen of each, and the plainly frozen model to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphopt
from graphopt.passes.freeze import Freeze
from tests.support import plans
from tests.support.backbones import Small


def resnet10() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


class Functional(nn.Module):
    """Everything as function calls and tensor methods, in place where there is a way."""

    def __init__(self, leaf: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = FunctionalBody(leaf)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.body(self.stem(x)), 1).flatten(1))


class FunctionalBody(nn.Module):
    """Without a child it is one leaf to the tracer, because it asks for its mode."""

    def __init__(self, leaf: bool = False) -> None:
        super().__init__()
        if not leaf:
            self.child = nn.Identity()
        self.weight, self.scale, self.shift = (nn.Parameter(torch.randn(s) * 0.2) for s in ((8, 8, 3, 3), (8,), (8,)))
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, padding="same")
        y = F.batch_norm(y, self.mean, self.variance, self.scale, self.shift, training=self.training)
        y = F.relu(y, inplace=True)
        y = F.max_pool2d(y, 3, 1, 1)
        y = torch.conv2d(y, self.weight, None, 1, 1).relu_()
        y = F.hardtanh(F.avg_pool2d(y, 3, 1, 1), -0.5, 0.5)
        y = F.leaky_relu(F.relu6(y + x), 0.1, True)
        return F.silu(y * self.gamma)


class Mutating(nn.Module):
    """In-place activations whose input is read later, through its own name, a view or a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = MutatingBlock()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class MutatingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.conv1(self.relu(y)) + y  # y as the activation left it
        early = z.view(z.shape)
        self.relu(z)
        z = self.conv2(z) + early
        w = self.same(z)
        self.relu(w)
        w = w + z
        w += x
        return self.relu(w)


class Mixed(nn.Module):
    """A layer whose weight is a learnable mix of its neighbours' (what the share pass makes)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.body = MixedBody()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class MixedBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(F.conv2d(x, self.a * self.first.weight + self.b * self.last.weight, padding=1))
        return self.last(x)


class Table(nn.Module):
    """Parameters that the graph reads itself, at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.patch, self.mix, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.place
        return self.fc(F.gelu(self.mix(tokens))[:, 0])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (lambda: Small(drop=0.0), (3, 8, 8)),
    "functional": (Functional, (3, 8, 8)),
    "functional leaf": (lambda: Functional(leaf=True), (3, 8, 8)),
    "mutating": (Mutating, (3, 8, 8)),
    "mixed": (Mixed, (3, 8, 8)),
    "table": (Table, (3, 16, 16)),
    "resnet10": (resnet10, (3, 32, 32)),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.0), (3, 32, 32)),
    "test_resnet": (lambda: timm.create_model("test_resnet"), (3, 32, 32)),
    "test_vit": (lambda: timm.create_model("test_vit", img_size=32), (3, 32, 32)),
    "test_convnext": (lambda: timm.create_model("test_convnext"), (3, 32, 32)),
    "test_efficientnet": (lambda: timm.create_model("test_efficientnet"), (3, 32, 32)),
    "test_nfnet": (lambda: timm.create_model("test_nfnet"), (3, 32, 32)),
}
#: backbone, selection, names of the modules and parameters it comes to
CASES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("small", ["stem", "blocks.0", "blocks.1"], ("stem", "blocks.0", "blocks.1")),
    ("small", ["blocks.1", "blocks.2"], ("blocks.1", "blocks.2")),
    ("small", {"blocks": True, "every": 2}, ("blocks.1", "blocks.3")),
    ("functional", "body", ("body",)),
    ("functional", ["stem", "body"], ("stem", "body")),
    ("functional leaf", "body", ("body",)),
    ("mutating", "block", ("block",)),
    ("mutating", ["block.norm", "block.conv2"], ("block.norm", "block.conv2")),
    ("mixed", "body", ("body",)),
    ("mixed", ["body.first", "body.last"], ("body.first", "body.last")),
    ("table", ["patch", "token", "place"], ("patch", "token", "place")),
    ("table", ["token", "mix"], ("token", "mix")),
    ("resnet10", ["layer1", "layer2"], ("layer1", "layer2")),
    ("resnet10", ["conv1", "bn1", "layer1", "layer3"], ("conv1", "bn1", "layer1", "layer3")),
    ("mobilenet_v3", ["features.1", "features.4", "features.5"], ("features.1", "features.4", "features.5")),
    ("test_resnet", ["layer1", "layer3"], ("layer1", "layer3")),
    (
        "test_vit",
        ["patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.2"],
        ("patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.2"),
    ),
    ("test_convnext", ["stages.0", "stages.1"], ("stages.0", "stages.1")),
    ("test_efficientnet", ["blocks.0", "blocks.1", "blocks.2"], ("blocks.0", "blocks.1", "blocks.2")),
    ("test_nfnet", ["stages.0", "stages.1"], ("stages.0", "stages.1")),
]


def below(name: str, paths: Sequence[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in paths)


def plainly_frozen(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """What a careful user would do by hand, in train mode: no gradients, norms in eval mode."""
    model = copy.deepcopy(model).double().train()
    for name, parameter in model.named_parameters():
        if below(name, paths):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if below(name, paths) and (hasattr(module, "running_mean") or isinstance(module, FunctionalBody)):
            module.eval()
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(kept.values())


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.uniform_(0.5, 2)
    return model, shape


@cache
def shared(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The same, traced once: copy the backbone to change it."""
    return built(name)


def compiled(model: nn.Module, selection: Any, shape: tuple[int, ...], **options: Any) -> graphopt.Plan:
    return plans.compiled(model, [Freeze(select=selection, **options)], shape, verify="fast")
