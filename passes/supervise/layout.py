"""Which dimension of an activation is its channels, and which are positions: found in the graph around it, not by the model's name.

A convolution or batch norm next to an activation has its channels in dimension 1, a linear layer or layer norm in the last. Where no
operation near it decides, shapes do (a square pair of dimensions is the grid).
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphopt.ir.graph import Graph
from graphopt.ir.nodes import leaf

#: more leading tokens than any published backbone adds (class, distillation and register tokens)
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class ActivationLayout:
    """How to read an activation of shape (N, ...).

    Attributes:
        channel: the dimension of the channels, from 1.
        channels: its size.
        length: positions in all, leading tokens included; 1 for (N, C).
        grid: height and width of the positions without leading tokens; None where the graph does not show them.
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
        """As a map (N, C, H, W), leading tokens left out; a view where the layout allows one. Needs a grid."""
        assert self.grid is not None
        if self.images:
            return x
        if self.rank == 4:
            return x.movedim(self.channel, 1)
        x = x.unsqueeze(-1) if self.rank == 2 else x.movedim(self.channel, 1)
        return torch.unflatten(x[..., self.prefix :], -1, self.grid)

    def tokens(self, x: Tensor) -> Tensor:
        """As (N, positions, C), leading tokens included; a view where the layout allows one."""
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
        """As (N, height, width, C) over that grid, leading tokens left out; a view. Of maps and tokens, not of rank above 4."""
        x = x.unsqueeze(1) if self.rank == 2 else x.movedim(self.channel, -1)
        return x if self.rank == 4 else torch.unflatten(x[:, self.prefix :], 1, grid)


def layout_of(graph: Graph, node: Node) -> ActivationLayout:
    """The layout of an activation of the graph, of shape (N, ...)."""
    shape = tuple(node.meta["val"].shape)
    rank = len(shape)
    if rank == 2:
        return ActivationLayout(1, shape[1], 1, (1, 1), 0, 2)
    channel = 1 if node.op == "placeholder" and rank == 4 else _channel(graph, node)
    if channel is None:
        # No operation decides: the two equal dimensions of a map are its grid; tokens come before channels.
        channel = 1 if rank >= 4 and (shape[-1] == shape[-2] or shape[1] != shape[2]) else rank - 1
    positions = [shape[d] for d in range(1, rank) if d != channel]
    length = math.prod(positions)
    grid, prefix = (None, 0) if rank > 4 else ((positions[0], positions[1]), 0) if rank == 4 else _grid_of_tokens(graph, node, length)
    return ActivationLayout(channel, shape[channel], length, grid, prefix, rank)


def _grid_of_tokens(graph: Graph, node: Node, length: int) -> tuple[tuple[int, int] | None, int]:
    """The grid that tokens came from, and how many lead them: of the maps before them the one nearest in size, the last of those."""
    fits: list[tuple[int, tuple[int, int]]] = []
    for other in reversed(graph.nodes[: graph.order[node]]):
        value = other.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and value.shape[0] == node.meta["val"].shape[0]:
            channel = 1 if other.op == "placeholder" else _channel(graph, other)
            grid = (value.shape[2], value.shape[3]) if channel == 1 else (value.shape[1], value.shape[2])
            if channel in (1, 3) and 0 <= length - math.prod(grid) <= MOST_PREFIX_TOKENS:
                fits.append((length - math.prod(grid), grid))
    if fits:
        prefix, grid = min(fits, key=lambda fit: fit[0])
        return grid, prefix
    for prefix in range(2):
        side = math.isqrt(length - prefix)
        if side > 1 and side * side == length - prefix:
            return (side, side), prefix
    return None, 0


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_FUNCTIONS: dict[Any, int] = {
    F.linear: -1, F.layer_norm: -1, F.conv1d: 1, F.conv2d: 1, F.batch_norm: 1, F.group_norm: 1, F.max_pool2d: 1, F.avg_pool2d: 1,
    F.adaptive_avg_pool2d: 1, torch.conv2d: 1, torch.layer_norm: -1,
}  # fmt: skip
_PASSING = {operator.add, operator.iadd, operator.mul, operator.sub, torch.add, torch.mul, F.relu, F.gelu, F.silu, torch.relu}
_PASSING_NAMES = ("contiguous", "relu", "gelu", "add", "add_", "mul", "addcmul")


def _channel(graph: Graph, start: Node) -> int | None:
    """The dimension of the channels, from the nearest operation after an activation, or else before it, that decides it."""
    found = _search(graph, start, forward=True)
    return _search(graph, start, forward=False) if found is None else found


def _search(graph: Graph, start: Node, *, forward: bool) -> int | None:
    rank = start.meta["val"].dim()
    unmoved = tuple(range(rank))
    # What dimension of the node at hand each dimension of `start` has become.
    queue: list[tuple[Node, tuple[int, ...]]] = [(start, unmoved)]
    seen = {start}
    while queue:
        node, dims = queue.pop(0)
        if (node is not start or not forward) and (decided := _decides(graph, node)) is not None:
            # A linear layer after a transposition may mix positions (MLP-Mixer, ResMLP): it decides nothing.
            if dims == unmoved or not (node.target is F.linear or isinstance(leaf(graph, node), nn.Linear)):
                return dims.index(decided % rank)
            continue
        for other in node.users if forward else node.all_input_nodes:
            if other in seen or not isinstance(other.meta.get("val"), Tensor):
                continue
            seen.add(other)
            if forward and _decides(graph, other) is not None:
                # What it takes has the dimensions of what it is given.
                queue.append((other, dims))
                continue
            moved = _moved(other if forward else node, dims, forward, rank)
            if moved is not None and other.meta["val"].dim() == rank:
                queue.append((other, moved))
    return None


def _decides(graph: Graph, node: Node) -> int | None:
    """The channel dimension of what this operation takes and gives, where its kind alone decides it."""
    module = leaf(graph, node)
    if module is not None:
        name = type(module).__name__
        if isinstance(module, _CHANNELS_FIRST) or (name.endswith(("2d", "Act")) and "Norm" in name):
            return 1
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)) or "LayerNorm" in name or "RmsNorm" in name:
            return -1
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _moved(node: Node, dims: tuple[int, ...], forward: bool, rank: int) -> tuple[int, ...] | None:
    """Where the dimensions go through `node`: the same for element-wise work, permuted by a permutation, None past anything else."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in ("permute", "transpose"):
        order = _permutation(node, name, rank)
        if order is None:
            return None
        return tuple(order.index(d) for d in dims) if forward else tuple(order[d] for d in dims)
    shapes = [tuple(i.meta["val"].shape) for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
    same = all(len(s) < rank or s == tuple(node.meta["val"].shape) for s in shapes)
    elementwise = node.op == "call_module" or node.target in _PASSING or name in _PASSING_NAMES
    return dims if elementwise and same else None


def _permutation(node: Node, name: str, rank: int) -> list[int] | None:
    """Which dimension of its input each dimension of a permutation's output is; None where that is not written in numbers."""
    given: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if len(given) != (rank if name == "permute" else 2) or not all(isinstance(n, int) for n in given):
        return None
    numbers = [n % rank for n in given]
    if name == "permute":
        return numbers
    swapped = dict(zip(numbers, reversed(numbers), strict=True))
    return [swapped.get(d, d) for d in range(rank)]
