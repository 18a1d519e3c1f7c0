"""Decoders: what a module puts out must still tell what went in.

The feature decoders (arXiv 2212.14215) rebuild the module's own input; the image decoder (InfoPro, ICLR 2021) rebuilds the network's.
A decoder first looks at the module's output, `look(h) -> (h, seen)`, and the head goes on from the `h` it gives back; then
`decoder(seen, x) -> (prediction, goal)`, of one shape. The goal is never differentiated. A decoder may work on a fraction of the
positions: which ones changes from step to step, so that every position takes its turn, and it draws no random numbers, so that dropout
masks in the backbone stay what they were.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.supervise.layout import Layout

Structure = Literal["pointwise", "linear", "conv", "transformer"]

#: channels between the image decoder's two convolutions, InfoPro's
IMAGE_HIDDEN = 12
#: most channels between the feature decoder's two convolutions
CONV_HIDDEN = 64
#: most channels between the pointwise decoder's two layers: a wide transformer's would cost what the module saves
POINTWISE_HIDDEN = 128
#: channels per attention head of the transformer decoder
HEAD_WIDTH = 32


class Turns(nn.Module):
    """Takes turns: `count` of `total` indices per call, all of them within `total / count` calls. A buffer counts the calls.

    Args:
        tables: what to give for each index: tensors (total, n), int64, from which a call gets (count * n,) each.
    """

    def __init__(self, total: int, count: int, *tables: Tensor) -> None:
        super().__init__()
        # Worked out beforehand: a few small operations in every module and step would cost more than the decoder.
        calls = _range(-(-total // count))
        order = _shuffled(total)[(calls[:, None] * count + _range(count)) % total]
        self.tables = tuple(f"table{i}" for i in range(len(tables)))
        for name, table in zip(self.tables, tables, strict=True):
            self.register_buffer(name, table[order].flatten(1), persistent=False)
        self.calls = len(calls)
        self.register_buffer("turn", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> list[Tensor]:
        found = [getattr(self, name).index_select(0, self.turn).flatten() for name in self.tables]
        if self.calls > 1:
            self.turn.add_(1).remainder_(self.calls)
        return found


def _range(count: int) -> Tensor:
    return torch.arange(count, device="cpu")


def _shuffled(total: int) -> Tensor:
    # These are on the CPU whatever the default device: the generator is, and a model may be built on none.
    return torch.randperm(total, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


class _Sampled(torch.autograd.Function):
    """A tensor and some of its entries along one dimension; backward adds the entries' gradient into the tensor's.

    Left to itself, autograd makes a tensor of zeros for the entries' gradient, and another for the sum: passes over a whole map of which
    an eighth is looked at.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dim = dim
        ctx.save_for_backward(index)
        return h.view_as(h), h.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, whole: Tensor, entries: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        # In the map's own order first: the few entries are quicker put in order than added out of it.
        return whole.clone().index_add_(ctx.dim, index, entries.contiguous()), None, None


def sampled(h: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """`h`, to be used in its place from here on, and `h.index_select(dim, index)`."""
    result: tuple[Tensor, Tensor] = _Sampled.apply(h, dim, index)
    return result


class PatchDecoder(nn.Module):
    """Rebuilds the input from single positions of the output: each foretells the patch of the input that lies over it.

    A source of shape (N, h*w positions, C) and a goal on a grid r times as fine give, from k positions, a prediction (N, k, r*r*C').
    Where the goal's grid is no multiple of the source's, it is average-pooled to the nearest one. Of maps with channels first, whole rows
    are sampled: their values lie together in memory, single positions' do not. All take their turn, see `Turns`.

    Args:
        source, goal: layouts of the module's output and input.
        fraction: of the source's positions, per step.
        structure: "linear" (one linear layer), "pointwise" (norm and a hidden layer before it, so that features need not hold their input
            linearly), "transformer" (a block over the sampled positions before it).
    """

    def __init__(self, source: Layout, goal: Layout, fraction: float, structure: Structure) -> None:
        super().__init__()
        self.source, self.goal = source, goal
        height, width = source.grid or (1, source.length - source.prefix)
        self.ratio = (1, 1)
        self.resize: tuple[int, int] | None = None
        if source.grid is not None and goal.grid is not None:
            self.ratio = (_ratio(source.grid[0], goal.grid[0]), _ratio(source.grid[1], goal.grid[1]))
            size = (height * self.ratio[0], width * self.ratio[1])
            self.resize = size if size != goal.grid else None
        #: whole rows are sampled of maps
        self.rows = source.images and (goal.images or self.resize is not None)
        count = max(1, round(fraction * (height if self.rows else height * width)))
        if self.rows:
            self.turns = Turns(height, count, _range(height)[:, None], _range(height * self.ratio[0]).view(height, -1))
        else:
            fine = _range(height * width * math.prod(self.ratio)).view(height, self.ratio[0], width, self.ratio[1])
            patches = fine.transpose(1, 2).reshape(height * width, -1) + (goal.prefix if self.resize is None else 0)
            self.turns = Turns(height * width, count, _range(height * width)[:, None] + source.prefix, patches)
        width = source.channels
        self.block: nn.Module | None = None
        if structure == "pointwise":
            width = min(2 * width, POINTWISE_HIDDEN)
            self.block = nn.Sequential(nn.LayerNorm(source.channels), nn.Linear(source.channels, width), nn.GELU())
        elif structure == "transformer":
            self.block = Block(width)
        self.fc = nn.Linear(width, goal.channels * math.prod(self.ratio))

    @staticmethod
    def misfit(source: Layout, goal: Layout) -> str | None:
        """Why these layouts cannot be put over each other, or None."""
        if source.grid is not None and goal.grid is not None:
            return None
        if source.length - source.prefix == goal.length - goal.prefix:
            return None
        return f"{goal} cannot be put over {source}: the graph shows no grid for them"

    def look(self, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        here, there = self.turns()
        flat, dim = (h, 2) if self.rows else self.source.flat(h)
        whole, picked = sampled(flat, dim, here)
        return whole.view(h.shape), (picked.flatten(2).transpose(1, 2) if dim == 2 else picked, there)

    def forward(self, seen: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Both (N, k, C' * r*r)."""
        picked, there = seen
        with torch.no_grad():
            goal = self._patches(x, there).contiguous()
        # Contiguous, so that all samples go through one matrix product: one per sample would make a gradient of the weight for each.
        picked = picked.contiguous()
        return self.fc(picked if self.block is None else self.block(picked)), goal

    def _patches(self, x: Tensor, there: Tensor) -> Tensor:
        """(N, k, C' * r*r): the goal over the sampled positions."""
        if self.resize is not None:
            x = F.adaptive_avg_pool2d(self.goal.map(x), self.resize)
        if self.rows:
            x, (down, right) = x.index_select(2, there), self.ratio
            if self.ratio == (1, 1):
                return x.flatten(2).transpose(1, 2)
            return x.unflatten(2, (-1, down)).unflatten(4, (-1, right)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        picked = self.goal.pick(x, there) if self.resize is None else x.flatten(2).index_select(2, there).transpose(1, 2)
        return picked.reshape(len(x), len(there) // math.prod(self.ratio), -1)


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
            starts = _range(math.prod(self.places))
            self.turns = Turns(len(starts), 1, starts[:, None] // self.places[1], starts[:, None] % self.places[1])
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

    def look(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h, h

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.source.map(seen)
        with torch.no_grad():
            x = self.goal.map(x)
            if self.window is not None and self.fine != self.goal.grid:
                x = F.adaptive_avg_pool2d(x, self.fine)
        if self.window is not None:
            for dim, start in enumerate(self.turns(), 2):
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

    def look(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.look(h)

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = self.image(x)
        return self.decoder(seen, x)


def build(structure: Structure, source: Layout, goal: Layout, fraction: float) -> nn.Module:
    """The feature decoder of that structure."""
    if structure == "conv":
        return ConvDecoder(source, goal, fraction, min(source.channels, CONV_HIDDEN), aligned=False)
    return PatchDecoder(source, goal, fraction, structure)


def misfit(structure: Structure | Literal["image"], source: Layout, goal: Layout) -> str | None:
    """Why the decoder of that structure cannot rebuild `goal` from `source`, or None."""
    kind: Any = ConvDecoder if structure in ("conv", "image") else PatchDecoder
    return kind.misfit(source, goal)
