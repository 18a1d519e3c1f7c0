"""Decoders: they rebuild a module's input from its output, so that the output must hold the information.

The feature decoders (arXiv 2212.14215) rebuild the module's own input; the image decoder (InfoPro, ICLR 2021) rebuilds the network's.
A decoder first samples the module's output, `sample(h, step_index) -> (h, state)`, and the head runs on the `h` that this returns; then
`decoder(state, x) -> (prediction, goal)`, of one shape; x needs no gradient. A decoder may work on a fraction of the positions, which
rotate with `step_index` so that all are covered. It draws no random numbers: dropout masks in the backbone stay what they were.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import RunError
from graphopt.passes.supervise.layout import ActivationLayout
from graphopt.passes.supervise.options import Structure

#: channels between the image decoder's two convolutions, InfoPro's
IMAGE_HIDDEN = 12
#: most channels between the feature decoder's two convolutions
CONV_HIDDEN = 64
#: most channels between the pointwise decoder's two layers: a wide transformer's would cost what the module saves
POINTWISE_HIDDEN = 128
#: channels per attention head of the transformer decoder
HEAD_WIDTH = 32
#: highest rank of the linear decoder: for wide features, a full matrix (channels by patch) would be larger than the module's own weights
LINEAR_RANK = 64

#: how far a reverted image may lie outside [0, 1]: normalised in bfloat16, by rounded statistics
ROUNDING = 0.01
_FIX_RANGE = "Give mean and std as the data is normalised ([data] mean, std); erasing by random values (erase_mode) leaves that range, too"


def position_at(step_index: int, count: int) -> int:
    """Which of `count` positions a step takes: each once in `count` steps, successive ones far apart (golden section)."""
    stride = round(0.618 * count)
    while math.gcd(stride, count) != 1:
        stride += 1
    return step_index * stride % count


@dataclass(frozen=True)
class Rows:
    """Evenly spaced rows of a grid of `height` rows, which rotate from step to step: every `stride`-th within `extent` rows."""

    height: int
    count: int

    @property
    def stride(self) -> int:
        return self.height // self.count

    @property
    def extent(self) -> int:
        return self.stride * (self.count - 1) + 1

    def start(self, step_index: int) -> int:
        """The first row of a step. Every row is in some step's: the starts cover a stride, and reach the last row."""
        return position_at(step_index, self.height - self.extent + 1)

    def of(self, x: Tensor, start: int) -> Tensor:
        """The rows (N, count, ...) of x (N, height, ...); a view."""
        return x if self.count == self.height else x.narrow(1, start, self.extent)[:, :: self.stride]


class _Sampled(torch.autograd.Function):
    """An activation and some rows of it, (N, k, C); the backward adds the rows' gradient to the activation's.

    By itself, autograd would allocate a map of zeros for the rows' gradient and another for the sum, where only an eighth of the map is
    sampled.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, layout: ActivationLayout, grid: tuple[int, int], rows: Rows, start: int) -> tuple[Tensor, Tensor]:
        ctx.sampled = layout, grid, rows, start
        picked = rows.of(layout.over(h, grid), start).reshape(len(h), -1, layout.channels)
        # Contiguous, so that all samples go through one matrix product: one per sample would make a gradient of the weight for each.
        return h.view_as(h), picked.contiguous()

    @staticmethod
    def backward(ctx: Any, whole: Tensor, sampled: Tensor) -> Any:
        layout, grid, rows, start = ctx.sampled
        gradient = whole.clone()
        view = rows.of(layout.over(gradient, grid), start)
        view.add_(sampled.reshape(view.shape))
        return gradient, None, None, None, None


class PatchDecoder(nn.Module):
    """Rebuilds the input from single positions of the output: each predicts the patch of the input at the same place.

    A source of shape (N, h*w positions, C) and a goal on a grid r times as fine give, from k positions, a prediction (N, k, r*r*C').
    Where the goal's grid is no multiple of the source's, it is average-pooled to the nearest multiple. Whole, evenly spaced rows of
    positions are sampled, as a view and without a list of indices. Tokens without a grid count as rows of one position.

    Args:
        source, goal: layouts of the module's output and input.
        fraction: share of the source's rows per step.
        structure: "linear" (one linear map, of rank 64 at most where that is cheaper), "pointwise" (norm and a hidden layer, so that
            the input need not be a linear function of the features), "transformer" (a block over the sampled positions, then a linear
            layer).
    """

    def __init__(self, source: ActivationLayout, goal: ActivationLayout, fraction: float, structure: Structure) -> None:
        super().__init__()
        self.source, self.goal, self.ratio = source, goal, (1, 1)
        self.resize: tuple[int, int] | None = None
        if source.grid is not None and goal.grid is not None:
            self.grid = source.grid
            self.ratio, size = _multiple(source.grid, goal.grid)
            self.resize = size if size != goal.grid else None
        else:
            self.grid = source.grid or goal.grid or (source.length - source.prefix, 1)
        self.rows = Rows(self.grid[0], max(1, round(fraction * self.grid[0])))
        width = source.channels
        self.block: nn.Module | None = None
        if structure == "pointwise":
            width = min(2 * width, POINTWISE_HIDDEN)
            self.block = nn.Sequential(nn.LayerNorm(source.channels), nn.Linear(source.channels, width), nn.GELU())
        elif structure == "transformer":
            self.block = Block(width)
        patch = goal.channels * math.prod(self.ratio)
        if structure == "linear" and LINEAR_RANK * (width + patch) < width * patch:
            self.block, width = nn.Linear(width, LINEAR_RANK, bias=False), LINEAR_RANK
        self.fc = nn.Linear(width, patch)

    def sample(self, h: Tensor, step_index: int) -> tuple[Tensor, tuple[Tensor, int]]:
        """The activation, and the step's positions (N, k, C) with their first row."""
        start = self.rows.start(step_index)
        whole, picked = _Sampled.apply(h, self.source, self.grid, self.rows, start)
        return whole, (picked, start)

    def forward(self, state: tuple[Tensor, int], x: Tensor) -> tuple[Tensor, Tensor]:
        picked, start = state
        return self.fc(picked if self.block is None else self.block(picked)), self._patches(x, start)

    def _patches(self, x: Tensor, start: int) -> Tensor:
        """(N, k, r*r * C'): the goal at the sampled rows."""
        down, right = self.ratio
        if self.resize is not None:
            x = F.adaptive_avg_pool2d(self.goal.map(x), self.resize).movedim(1, -1)
        else:
            x = self.goal.over(x, (self.grid[0] * down, self.grid[1] * right))
        if self.ratio == (1, 1):
            return self.rows.of(x, start).reshape(len(x), -1, self.goal.channels)
        rows = self.rows.of(torch.unflatten(x, 1, (-1, down)), start)
        patches = torch.unflatten(rows, 3, (-1, right)).transpose(2, 3)
        return patches.reshape(len(x), self.rows.count * self.grid[1], -1)


def _multiple(coarse: tuple[int, int], fine: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many times as fine a grid is as another, and the multiple of that other which is nearest to it."""
    down, right = (max(1, round(f / c)) for c, f in zip(coarse, fine, strict=True))
    return (down, right), (coarse[0] * down, coarse[1] * right)


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

    With a fraction below 1 it works on a window of that share of the area, which moves over the map from step to step.

    Args:
        source, goal: layouts of the module's output, and of what to rebuild.
        hidden: channels between the convolutions.
        aligned: interpolate with corner pixels aligned, as InfoPro does.
    """

    def __init__(self, source: ActivationLayout, goal: ActivationLayout, fraction: float, hidden: int, aligned: bool) -> None:
        super().__init__()
        assert source.grid is not None
        assert goal.grid is not None
        self.source, self.goal, self.aligned = source, goal, aligned
        self.window: tuple[int, int] | None = None
        self.ratio, self.fine = _multiple(source.grid, goal.grid)
        if fraction < 1:
            height, width = source.grid
            self.window = (max(1, round(height * math.sqrt(fraction))), max(1, round(width * math.sqrt(fraction))))
            self.positions = (height - self.window[0] + 1, width - self.window[1] + 1)
        self.conv1 = nn.Conv2d(source.channels, hidden, 3, 1, 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, goal.channels, 3, 1, 1)

    def sample(self, h: Tensor, step_index: int) -> tuple[Tensor, tuple[Tensor, int]]:
        return h, (h, step_index)

    def forward(self, state: tuple[Tensor, int], x: Tensor) -> tuple[Tensor, Tensor]:
        h, x = self.source.map(state[0]), self.goal.map(x)
        if self.window is not None:
            if self.fine != self.goal.grid:
                x = F.adaptive_avg_pool2d(x, self.fine)
            position = position_at(state[1], math.prod(self.positions))
            # Not by divmod: torch.compile would compile the decoder again for every position.
            for dim, start in enumerate((position // self.positions[1], position % self.positions[1])):
                size, ratio = self.window[dim], self.ratio[dim]
                h = h.narrow(2 + dim, start, size)
                x = x.narrow(2 + dim, start * ratio, size * ratio)
        h = F.interpolate(h, size=x.shape[2:], mode="bilinear", align_corners=self.aligned)
        return self.conv2(F.relu(self.bn(self.conv1(h)))), x


class ImageDecoder(nn.Module):
    """InfoPro's decoder of the network's own input, which it first de-normalises to [0, 1]: logits and image, both (N, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, source: ActivationLayout, image: ActivationLayout, fraction: float, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.decoder = ConvDecoder(source, image, fraction, IMAGE_HIDDEN, aligned=True)

    def sample(self, h: Tensor, step_index: int) -> tuple[Tensor, tuple[Tensor, int]]:
        return self.decoder.sample(h, step_index)

    @torch.no_grad()
    def check(self, image: Tensor) -> None:
        """Raises RunError if the image (N, C, H, W) leaves [0, 1] once its normalisation is reverted, by more than rounding."""
        low, high = (image * self.std + self.mean).aminmax()
        if low < -ROUNDING or high > 1 + ROUNDING:
            what = f"with mean and std reverted, the image has values from {low:.3g} to {high:.3g}, and the decoder rebuilds [0, 1]"
            raise RunError(what, where="supervise", fix=_FIX_RANGE)

    def forward(self, state: tuple[Tensor, int], x: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder(state, (x * self.std + self.mean).clamp(0, 1))


def build(structure: Structure, source: ActivationLayout, goal: ActivationLayout, fraction: float) -> nn.Module:
    """The feature decoder of that structure."""
    if structure == "conv":
        return ConvDecoder(source, goal, fraction, min(source.channels, CONV_HIDDEN), aligned=False)
    return PatchDecoder(source, goal, fraction, structure)


def incompatibility(structure: Structure | Literal["image"], source: ActivationLayout, goal: ActivationLayout) -> str | None:
    """Why the decoder of that structure cannot rebuild `goal` from `source`, or None."""
    gridless = next((layout for layout in (source, goal) if layout.grid is None), None)
    if structure in ("conv", "image"):
        return None if gridless is None else f"a convolution needs a map, and the graph shows no grid for {gridless}"
    rank = max(source.rank, goal.rank)
    if rank > 4:
        return f"a decoder rebuilds maps and tokens, not activations of {rank} dimensions"
    if gridless is None or source.length - source.prefix == goal.length - goal.prefix:
        return None
    return f"{goal} cannot be aligned with {source}: the graph shows no grid for them"
