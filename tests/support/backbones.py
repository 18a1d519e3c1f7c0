"""Small backbones that tests share. Each is one difficulty."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual block whose dropout reads the mode in forward."""

    def __init__(self, width: int, drop: float = 0.0, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.dropout(y, self.drop, training=self.training)
        return F.relu(x + self.bn2(self.conv2(y)))


class Small(nn.Module):
    """Stem, four residual blocks, pool, linear: input (3, 8, 8) and up, ten classes."""

    def __init__(self, width: int = 8, blocks: int = 4, drop: float = 0.3, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(width, drop, norm) for _ in range(blocks)))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class ByValue(nn.Module):
    """Its forward branches on a value: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.sum() > 0 else x


class ByModeStructure(nn.Module):
    """Calls a child in train mode only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = nn.Linear(width, width)
        self.always = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.extra(x)
        return self.always(x)


class Auxiliary(nn.Module):
    """Returns a second output in train mode (GoogLeNet's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.side = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.stem(x).mean((2, 3))
        return (self.fc(y), self.side(y)) if self.training else self.fc(y)


class Hollow(nn.Module):
    """One untraceable child among ordinary ones, an unused parameter, a stray constant, a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = ByValue()
        self.never = nn.Parameter(torch.zeros(3))
        self.register_buffer("offset", torch.ones(4), persistent=False)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.conv(x)).mean((2, 3)) + self.offset
        return self.fc(y * torch.tensor([1.0, 2.0, 3.0, 4.0]))


class Modes(nn.Module):
    """A child whose structure depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.child, self.fc = nn.Conv2d(3, 4, 3), ByModeStructure(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.child(self.stem(x).mean((2, 3))))


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.fc = nn.Conv2d(3, 4, 3), Residual(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.same(self.same(self.stem(x))).mean((2, 3)))


class FourBlocks(nn.Module):
    """Stem, four blocks on (N, 8, H, W), pool, linear."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))
