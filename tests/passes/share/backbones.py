"""Small backbones of every family that sharing knows, with what is shared of each at every second block."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from graphopt import Plan
from graphopt.compiler.pipeline import Verify
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.share import Share
from graphopt.passes.share.neighbours import SharedBlock
from tests.support import plans


class Difficult(nn.Module):
    """A residual block whose convolutions use every option that a convolution has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.two = nn.Conv2d(width, width, 5, padding="same", padding_mode="reflect", bias=False)
        self.three = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.gain = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.norm(self.one(x))))
        return x + self.gain * self.three(y.flatten(2)).view(x.shape)


class DifficultNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 10)
        self.blocks = nn.Sequential(*(Difficult(4) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Units(nn.Module):
    """VGG's features, narrow: units of convolution, norm and activation, some with a pool."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        self.features = models.vgg.make_layers([8, "M", 16, 16, 16, 16, "M", 16], batch_norm=norms)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **arguments)


def _swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 8, [2, 4], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=10)


def _convnext() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(8, 16, 3), models.convnext.CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(setting, stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=10)


#: name -> (factory, input, blocks shared at every = 2)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "CIFAR ResNet": (lambda: CifarResNet(20), (3, 8, 8), 1),
    "torchvision ResNet, basic": (lambda: models.ResNet(models.resnet.BasicBlock, [3, 1, 1, 1], num_classes=10), (3, 16, 16), 1),
    "torchvision ResNet, bottleneck": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 5, 1, 1], num_classes=10), (3, 32, 32), 1),
    "timm ResNetV2, pre-activation": (_timm("resnetv2_50", layers=(3, 5), channels=(32, 64)), (3, 32, 32), 1),
    "VGG units with norms": (Units, (3, 16, 16), 1),
    "VGG units": (lambda: Units(norms=False), (3, 16, 16), 1),
    "torchvision ViT": (lambda: models.VisionTransformer(16, 4, 5, 2, 16, 32, num_classes=10), (3, 16, 16), 2),
    "timm ViT": (_timm("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=5, embed_dim=24, num_heads=3), (3, 16, 16), 2),
    "timm CaiT": (_timm("cait_xxs24_224", img_size=32, depth=5, embed_dim=24, num_heads=2, init_values=0.5), (3, 32, 32), 2),
    "torchvision Swin": (_swin, (3, 32, 32), 1),
    "timm Swin": (_timm("swin_tiny_patch4_window7_224", img_size=28, depths=(5, 1), embed_dim=12, num_heads=(2, 2)), (3, 28, 28), 2),
    "timm Swin-V2": (
        _timm("swinv2_tiny_window8_256", img_size=32, window_size=4, depths=(5, 1), embed_dim=12, num_heads=(2, 2)),
        (3, 32, 32),
        2,
    ),
    "torchvision ConvNeXt": (_convnext, (3, 32, 32), 1),
    "timm ConvNeXt": (_timm("convnext_atto", depths=(5, 2, 2, 2), dims=(8, 12, 16, 20), ls_init_value=0.5), (3, 32, 32), 2),
    "timm ConvNeXt-V2": (_timm("convnextv2_atto", depths=(5, 2, 2, 2), dims=(8, 12, 16, 20)), (3, 32, 32), 2),
    "every option of a convolution": (DifficultNet, (3, 8, 8), 2),
}


@cache
def family(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """A family's backbone, the shape of a sample, and how many blocks are shared at every = 2. Copy the backbone to change it."""
    make, shape, count = FAMILIES[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, shape, count


def compiled(
    model: nn.Module, input: tuple[int, ...] = (3, 8, 8), *, verify: Verify = "fast", costs: bool = False, batch: int = 32, **options: Any
) -> Plan:
    """A plan with one share pass."""
    return plans.compiled(model, [Share(**options)], input, verify=verify, costs=costs, batch=batch)


@cache
def _family_plan(name: str, options: tuple[tuple[str, Any], ...]) -> Plan:
    model, shape, _ = family(name)
    return compiled(model, shape, every=2, **dict(options))


def family_plan(name: str, **options: Any) -> Plan:
    """A family's plan at every second block, with a module of its own: compiled once, as several tests look at it."""
    plan = _family_plan(name, tuple(options.items()))
    return dataclasses.replace(plan, module=copy.deepcopy(plan.module))


def shared_blocks(plan: Plan) -> dict[str, SharedBlock]:
    """What the plan's first pass decided."""
    decision = plan.matched[0].match.decision
    assert decision is not None
    return decision
