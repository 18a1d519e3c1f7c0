"""Which dimension of an activation is its channels, and which are positions: read off the graph around it, not off the model's name.

A convolution or batch norm next to an activation has its channels in dimension 1, a linear layer or layer norm in the last. Where nothing
near it says, shapes do (a square pair of dimensions is the grid).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphopt.ir.graph import Graph

#: more leading tokens than any published backbone adds (class, distillation and register tokens)
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How to read an activation of shape (N, ...).

    Attributes:
        channel: the dimension of the channels, from 1.
        channels: its size.
        length: positions in all, leading tokens included; 1 for (N, C).
        grid: the positions' height and width, leading tokens aside; None where the graph does not tell.
        prefix: leading tokens that lie on no grid (class token, registers).
        rank: dimensions, the batch included.
    """

    channel: int
    channels: int
    length: int
    grid: tuple[int, int] | None
    prefix: int
    rank: int

    def __str__(self) -> str:
        if self.rank == 2:
            return f"(N, {self.channels})"
        if self.rank == 3:
            tokens = f"{self.length} tokens of {self.channels} channels"
            return tokens + (f" ({self.prefix} leading)" if self.prefix else "")
        where = f"{self.grid[0]}x{self.grid[1]}" if self.grid else f"{self.length} positions"
        return f"{where} with {self.channels} channels {'first' if self.channel == 1 else 'last'}"

    @property
    def images(self) -> bool:
        """Whether it is a map with channels first, as convolutions take it."""
        return self.rank == 4 and self.channel == 1

    def map(self, x: Tensor) -> Tensor:
        """x as a map (N, C, H, W), leading tokens left out; a view where the layout allows one. Needs a grid."""
        assert self.grid is not None
        if self.images:
            return x
        if self.rank == 4:
            return x.movedim(self.channel, 1)
        x = x.unsqueeze(-1) if self.rank == 2 else x.movedim(self.channel, 1)
        return x[..., self.prefix :].unflatten(-1, self.grid)

    def tokens(self, x: Tensor) -> Tensor:
        """x as (N, positions, C), leading tokens included; a view where the layout allows one."""
        return x.unsqueeze(1) if self.rank == 2 else x.movedim(self.channel, -1).flatten(1, -2)

    def mean(self, x: Tensor) -> Tensor:
        """(N, C): the mean over all positions, leading tokens included."""
        others = [d for d in range(1, self.rank) if d != self.channel]
        if not others:
            return x
        # The backward of mean divides every element of the map; a sum's repeats one number per channel. float16 could not hold the sum.
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
        return x.sum(others, dtype=wide) / self.length

    def over(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x as (N, height, width, C) over that grid, leading tokens left out; a view. Of maps and tokens, not of rank above 4."""
        x = x.unsqueeze(1) if self.rank == 2 else x.movedim(self.channel, -1)
        return x if self.rank == 4 else x[:, self.prefix :].unflatten(1, grid)


def layout_of(graph: Graph, node: fx.Node) -> Layout:
    """The layout of an activation of the graph, of shape (N, ...)."""
    shape = tuple(node.meta["val"].shape)
    rank = len(shape)
    if rank == 2:
        return Layout(1, shape[1], 1, (1, 1), 0, 2)
    channel = 1 if node.op == "placeholder" and rank == 4 else _channel(graph, node)
    if channel is None:
        # Nothing near it tells: the two equal dimensions of a map are its grid; tokens come before channels.
        channel = 1 if rank >= 4 and (shape[-1] == shape[-2] or shape[1] != shape[2]) else rank - 1
    positions = [d for d in range(1, rank) if d != channel]
    length = math.prod(shape[d] for d in positions)
    if rank == 4:
        return Layout(channel, shape[channel], length, (shape[positions[0]], shape[positions[1]]), 0, rank)
    if rank > 4:
        return Layout(channel, shape[channel], length, None, 0, rank)
    grid, prefix = _grid_of_tokens(graph, node, length)
    return Layout(channel, shape[channel], length, grid, prefix, rank)


def _grid_of_tokens(graph: Graph, node: fx.Node, length: int) -> tuple[tuple[int, int] | None, int]:
    """The grid that tokens came from: of the maps before them, the one that fits their number best, the last of those."""
    before = graph.nodes[: graph.nodes.index(node)]
    fits: list[tuple[int, tuple[int, int]]] = []
    for other in reversed(before):
        value = other.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and value.shape[0] == node.meta["val"].shape[0]:
            shape = tuple(value.shape)
            channel = 1 if other.op == "placeholder" else _channel(graph, other)
            if channel not in (1, 3):
                continue
            grid = (shape[2], shape[3]) if channel == 1 else (shape[1], shape[2])
            if 0 <= length - math.prod(grid) <= MOST_PREFIX_TOKENS:
                fits.append((length - math.prod(grid), grid))
    if fits:
        prefix, grid = min(fits, key=lambda fit: fit[0])
        return grid, prefix
    for prefix in range(2):
        side = math.isqrt(length - prefix)
        if side > 1 and side * side == length - prefix:
            return (side, side), prefix
    return None, 0


# -- which dimension is the channels --------------------------------------------------------------------------------------------

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_FUNCTIONS: dict[Any, int] = {
    F.linear: -1, F.layer_norm: -1, F.conv1d: 1, F.conv2d: 1, F.batch_norm: 1, F.group_norm: 1, F.max_pool2d: 1, F.avg_pool2d: 1,
    F.adaptive_avg_pool2d: 1, torch.conv2d: 1, torch.layer_norm: -1,
}  # fmt: skip
_PASSING = {operator.add, operator.iadd, operator.mul, operator.sub, torch.add, torch.mul, F.relu, F.gelu, F.silu, torch.relu}


def _channel(graph: Graph, start: fx.Node) -> int | None:
    """Follows an activation forward, then backward, to the nearest operation that knows its channels."""
    rank = start.meta["val"].dim()
    for forward in (True, False):
        # What dimension of the node at hand each dimension of `start` has become.
        queue: list[tuple[fx.Node, tuple[int, ...]]] = [(start, tuple(range(rank)))]
        seen = {start}
        while queue:
            node, dims = queue.pop(0)
            if not forward:
                said = _says(graph, node)
                if said is not None:
                    if dims == tuple(range(rank)) or not _linear(graph, node):
                        return dims.index(said % rank)
                    continue
            for other in node.users if forward else node.all_input_nodes:
                value = other.meta.get("val")
                if other in seen or not isinstance(value, Tensor):
                    continue
                seen.add(other)
                if forward and (said := _says(graph, other)) is not None:
                    # A linear layer behind a transposition may mix positions (MLP-Mixer, ResMLP): it tells nothing.
                    if dims == tuple(range(rank)) or not _linear(graph, other):
                        return dims.index(said % rank)
                    continue
                moved = _moved(other if forward else node, dims, forward, rank)
                if moved is not None and value.dim() == rank:
                    queue.append((other, moved))
    return None


def _says(graph: Graph, node: fx.Node) -> int | None:
    """The channel dimension of what this operation takes and gives, where its kind alone tells."""
    if node.op == "call_module":
        module = graph.module.get_submodule(node.target)
        name = type(module).__name__
        if isinstance(module, _CHANNELS_FIRST) or (name.endswith(("2d", "Act")) and "Norm" in name):
            return 1
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)) or "LayerNorm" in name or "RmsNorm" in name:
            return -1
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _linear(graph: Graph, node: fx.Node) -> bool:
    return node.target is F.linear or (node.op == "call_module" and isinstance(graph.module.get_submodule(node.target), nn.Linear))


def _moved(node: fx.Node, dims: tuple[int, ...], forward: bool, rank: int) -> tuple[int, ...] | None:
    """Where the dimensions go through `node`: the same for element-wise work, permuted by a permutation, None past anything else."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in ("permute", "transpose"):
        numbers = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if not all(isinstance(n, int) for n in numbers) or not numbers:
            return None
        order = list(range(rank))
        if name == "permute":
            if len(numbers) != rank:
                return None
            order = [n % rank for n in numbers]
        else:
            a, b = (n % rank for n in numbers)
            order[a], order[b] = order[b], order[a]
        return tuple(order.index(d) for d in dims) if forward else tuple(order[d] for d in dims)
    shapes = [tuple(i.meta["val"].shape) for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
    same = all(len(s) < rank or s == tuple(node.meta["val"].shape) for s in shapes)
    elementwise = (
        node.op == "call_module" or node.target in _PASSING or name in ("contiguous", "relu", "gelu", "add", "add_", "mul", "addcmul")
    )
    return dims if elementwise and same else None
