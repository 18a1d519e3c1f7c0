"""Backbones of blocks with one thing in them that a tracer or a rewrite can trip over."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from oddity import Block, Net, oddity
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _ByValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean().item() < 100 else x


@oddity()
class BlocksBranchOnValue(Net):
    block = _ByValue


class _ByChannels(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return super().forward(x)


@oddity()
class BlocksAssertOnChannels(Net):
    block = _ByChannels


class _Counting(Block):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


@oddity()
class BlocksCountInBuffers(Net):
    block = _Counting


class _Averaging(Block):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return super().forward(x)


@oddity()
class BlocksAverageInPlace(Net):
    block = _Averaging


class _Reassigning(_Averaging):
    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        return Block.forward(self, x)


@oddity()
class BlocksReassignBuffers(Net):
    block = _Reassigning


class _Cumulative(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, momentum=None)


@oddity()
class NormsAverageAllBatches(Net):
    block = _Cumulative


class _Stateless(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = (nn.BatchNorm2d(8, affine=False, track_running_stats=False) for _ in range(2))


@oddity()
class NormsWithoutState(Net):
    block = _Stateless


class _InPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


@oddity()
class BlocksInPlace(Net):
    block = _InPlace


class _Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@oddity()
class BlocksCheckpointed(Net):
    block = _Checkpointed


class _Bound(Block):
    def __init__(self) -> None:
        super().__init__()
        self.checkpoint = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.checkpoint(super().forward, x)


@oddity()
class BlocksCheckpointedByPartial(Net):
    block = _Bound


@oddity()
class BlocksScripted(Net):
    block = staticmethod(lambda: torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))


@oddity()
class LayersLazy(Net):
    block = staticmethod(lambda: nn.LazyConv2d(8, 1))


@oddity()
class SpectralNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.spectral_norm(block.get_submodule("conv1"))


@oddity()
class WeightNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.weight_norm(block.get_submodule("conv1"))


class _Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.scales[0] * x + self.scales[1] * self.branch(x))


@oddity()
class ListsOfScales(Net):
    block = _Scaled


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.a(y), y + self.b(x)


@oddity()
class BlocksWithTwoOutputs(Net):
    block = _Two

    def features(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for block in self.blocks:
            x, y = block(x, y)
        return x + y


class _Unused(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, masked: bool = False) -> Tensor:
        x = x * self.mask[:, None, None] if masked else x
        return super().forward(x) if x.mean().item() < 100 else x


@oddity()
class OpaqueWithUnusedParameters(Net):
    block = _Unused
