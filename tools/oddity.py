"""The base of the user-written backbones, and their register: `ODDITIES` has them by name, with the shape of one sample, of each input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.ir.inputs import Input

ODDITIES: dict[str, tuple[Callable[[], nn.Module], Input]] = {}


def oddity(*shape: Any, **arguments: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a backbone under the name of its class."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        ODDITIES[cls.__name__] = (functools.partial(cls, **arguments), shape or (3, 16, 16))
        return cls

    return register


class Block(nn.Module):
    """A residual block: two 3x3 convolutions with norms."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class Layers(nn.Module):
    """Stem, four blocks, pool, linear; whoever extends it says what it takes."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(type(self).block() for _ in range(4)))

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Net(Layers):
    """The layers, one after the other."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))
