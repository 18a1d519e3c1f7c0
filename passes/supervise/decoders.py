"""Decoders: what a module puts out must still tell what went in.

The feature decoders (arXiv 2212.14215) rebuild the module's own input; the image decoder (InfoPro, ICLR 2021) rebuilds the network's.
Each gives a prediction and its goal, of one shape; the goal is never differentiated. A decoder may work on a fraction of the positions:
which ones changes from step to step, so that every position takes its turn, and it draws no random numbers, so that dropout masks in
the backbone stay what they were.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.supervise.layout import Layout

Structure = Literal["linear", "conv", "transformer"]

#: channels between the image decoder's two convolutions, InfoPro's
IMAGE_HIDDEN = 12
#: most channels between the feature decoder's two convolutions
CONV_HIDDEN = 64
#: channels per attention head of the transformer decoder
HEAD_WIDTH = 32


class Turns(nn.Module):
    """Takes turns: `count` of `total` indices per call, all of them within `total / count` calls. A buffer counts the calls."""

    def __init__(self, total: int, count: int) -> None:
        super().__init__()
        self.count, self.total = count, total
        self.register_buffer("order", _shuffled(total), persistent=False)
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Indices (count,), int64."""
        if self.count == self.total:
            return torch.arange(self.total, device=self.turn.device)
        start = self.turn * self.count
        self.turn.add_(1)
        return self.order[(start + torch.arange(self.count, device=self.turn.device)) % self.total]


def _shuffled(total: int) -> Tensor:
    # On the CPU whatever the default device: the generator is.
    return torch.randperm(total, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


class PatchDecoder(nn.Module):
    """Rebuilds the input from single positions of the output: each foretells the patch of the input that lies over it.

    A source of shape (N, h*w positions, C) and a goal on a grid r times as fine give, from k positions, a prediction (N, k, r*r*C').
    Where the goal's grid is no multiple of the source's, it is average-pooled to the nearest one. Of maps with channels first, whole rows
    are sampled: their values lie together in memory, single positions' do not.

    Args:
        source, goal: layouts of the module's output and input.
        fraction: of the source's positions, per step.
        block: put a transformer block over the sampled positions before the linear layer.
    """

    def __init__(self, source: Layout, goal: Layout, fraction: float, block: bool) -> None:
        super().__init__()
        self.source, self.goal = source, goal
        height, width = source.grid or (1, source.length)
        self.ratio = (1, 1)
        self.resize: tuple[int, int] | None = None
        if source.grid is not None and goal.grid is not None:
            self.ratio = (_ratio(source.grid[0], goal.grid[0]), _ratio(source.grid[1], goal.grid[1]))
            fine = (height * self.ratio[0], width * self.ratio[1])
            self.resize = fine if fine != goal.grid else None
        #: positions that are sampled together
        self.run = width if source.images else 1
        units = height * width // self.run
        self.turns = Turns(units, max(1, round(fraction * units)))
        row = torch.arange(height * width) // width * self.ratio[0]
        column = torch.arange(height * width) % width * self.ratio[1]
        down, right = torch.arange(self.ratio[0]), torch.arange(self.ratio[1])
        pixels = (row[:, None, None] + down[:, None]) * width * self.ratio[1] + column[:, None, None] + right
        #: (units, positions per unit * r*r): where in the goal each unit's patches lie
        self.register_buffer("pixels", pixels.reshape(units, -1), persistent=False)
        self.block = Block(source.channels) if block else nn.Identity()
        self.fc = nn.Linear(source.channels, goal.channels * math.prod(self.ratio))

    @staticmethod
    def misfit(source: Layout, goal: Layout) -> str | None:
        """Why these layouts cannot be put over each other, or None."""
        if source.grid is not None and goal.grid is not None:
            return None
        if source.length - source.prefix == goal.length - goal.prefix:
            return None
        return f"{goal} cannot be put over {source}: the graph shows no grid for them"

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        units = self.turns()
        if self.source.images:
            picked = h.index_select(2, units).flatten(2).transpose(1, 2)
        else:
            picked = self.source.pick(h, units)
        with torch.no_grad():
            goal = self._patches(x, units)
        return self.fc(self.block(picked)), goal

    def _patches(self, x: Tensor, units: Tensor) -> Tensor:
        """(N, k, r*r*C'): the goal over the sampled positions."""
        if self.resize is not None:
            x = F.adaptive_avg_pool2d(self.goal.map(x), self.resize)
        if self.source.images and (self.goal.images or self.resize is not None):
            down, right = self.ratio
            rows = (units[:, None] * down + torch.arange(down, device=x.device)).flatten()
            patches = x.index_select(2, rows).unflatten(2, (-1, down)).unflatten(4, (-1, right))
            return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        pixels = self.pixels[units].flatten()
        rows = self.goal.pick(x, pixels) if self.resize is None else x.flatten(2).index_select(2, pixels).transpose(1, 2)
        return rows.reshape(len(x), len(units) * self.run, -1)


def _ratio(coarse: int, fine: int) -> int:
    return max(1, round(fine / coarse))


class Block(nn.Module):
    """A pre-norm transformer block on (N, k, C): attention among the sampled positions, then an MLP twice as wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // HEAD_WIDTH), 0, -1) if channels % n == 0)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))


class ConvDecoder(nn.Module):
    """Rebuilds a map from a map: bilinear upsampling to the goal's size, 3x3 convolution, norm, ReLU, 3x3 convolution.

    With a fraction below 1 it works on a window of that share of the area, which wanders over the map from step to step.

    Args:
        source, goal: layouts of the module's output, and of what to rebuild.
        hidden: channels between the convolutions.
        aligned: interpolate with corner pixels aligned, as InfoPro does.
    """

    def __init__(self, source: Layout, goal: Layout, fraction: float, hidden: int, aligned: bool) -> None:
        super().__init__()
        assert source.grid is not None
        assert goal.grid is not None
        self.source, self.goal, self.aligned = source, goal, aligned
        self.window: tuple[int, int] | None = None
        self.ratio = (_ratio(source.grid[0], goal.grid[0]), _ratio(source.grid[1], goal.grid[1]))
        self.fine = (source.grid[0] * self.ratio[0], source.grid[1] * self.ratio[1])
        if fraction < 1:
            self.window = tuple(max(1, round(s * math.sqrt(fraction))) for s in source.grid)  # type: ignore[assignment]
            self.places = tuple(s - w + 1 for s, w in zip(source.grid, self.window, strict=True))  # type: ignore[arg-type]
            self.turns = Turns(math.prod(self.places), 1)
        self.conv1 = nn.Conv2d(source.channels, hidden, 3, 1, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, goal.channels, 3, 1, 1)

    @staticmethod
    def misfit(source: Layout, goal: Layout) -> str | None:
        """Why these layouts do not suit it, or None."""
        for layout in (source, goal):
            if layout.grid is None:
                return f"a convolution needs a map, and the graph shows no grid behind {layout}"
        return None

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.source.map(h)
        with torch.no_grad():
            x = self.goal.map(x)
            if self.window is not None and self.fine != self.goal.grid:
                x = F.adaptive_avg_pool2d(x, self.fine)
        if self.window is not None:
            place = self.turns()
            for dim, start in ((2, place // self.places[1]), (3, place % self.places[1])):
                ratio = self.ratio[dim - 2]
                h = h.index_select(dim, start + torch.arange(self.window[dim - 2], device=h.device))
                x = x.index_select(dim, start * ratio + torch.arange(self.window[dim - 2] * ratio, device=x.device))
        h = F.interpolate(h, size=x.shape[2:], mode="bilinear", align_corners=self.aligned)
        return self.conv2(F.relu(self.bn(self.conv1(h)))), x


class Denormalise(nn.Module):
    """A normalised image (N, C, H, W) -> the image, in [0, 1]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.std + self.mean).clamp(0, 1)


class ImageDecoder(nn.Module):
    """InfoPro's decoder of the network's own input: logits and de-normalised image, both (N, C, H, W)."""

    def __init__(self, source: Layout, image: Layout, fraction: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.image = Denormalise(mean, std)
        self.decoder = ConvDecoder(source, image, fraction, IMAGE_HIDDEN, aligned=True)

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = self.image(x)
        return self.decoder(h, x)


def build(structure: Structure, source: Layout, goal: Layout, fraction: float) -> nn.Module:
    """The feature decoder of that structure."""
    if structure == "conv":
        return ConvDecoder(source, goal, fraction, min(source.channels, CONV_HIDDEN), aligned=False)
    return PatchDecoder(source, goal, fraction, block=structure == "transformer")


def misfit(structure: Structure | Literal["image"], source: Layout, goal: Layout) -> str | None:
    """Why the decoder of that structure cannot rebuild `goal` from `source`, or None."""
    kind: Any = ConvDecoder if structure in ("conv", "image") else PatchDecoder
    return kind.misfit(source, goal)
