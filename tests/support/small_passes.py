"""Backbones and a few training steps for tests of passes."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import Plan
from graphopt.models import cifar_resnet


def _resnet() -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    return cifar_resnet.build("resnet8"), (3, 8, 8)


def _vit() -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10), (3, 8, 8)


#: name -> what builds it and the shape of one sample
BACKBONES: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {"resnet": _resnet, "vit": _vit}


def trained(plan: Plan, input: tuple[int, ...], steps: int = 2) -> None:
    """Some steps of SGD on noise, eight samples each."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in plan.module.parameters() if p.requires_grad], lr=0.1)
    plan.module.train()
    for _ in range(steps):
        loss = F.cross_entropy(plan.module(torch.randn(8, *input)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
