"""Layers that the small passes put into a graph (low-rank pairs, norms of part of a batch, blurs), and where they can."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from graphopt import Editor, Effects, Graph, Region, Selector, select
from graphopt.ir.nodes import leaf, parameter_readers
from graphopt.ir.paths import owner
from graphopt.ir.regions import region_at

Dense = nn.Linear | nn.Conv2d


def leaves_in(selector: Selector | None, graph: Graph, takes: Callable[[nn.Module], bool]) -> dict[Region, tuple[str, ...]]:
    """Selected regions, or without a selector every fitting leaf by itself, with the paths of the leaves in them that `takes` accepts."""
    fitting = dict.fromkeys(str(n.target) for n in graph.nodes if (layer := leaf(graph, n)) is not None and takes(layer))
    regions = [region_at(graph, path) for path in fitting] if selector is None else select(selector, graph)
    found = ((r, dict.fromkeys(str(n.target) for n in r.nodes if n.op == "call_module")) for r in regions)
    return {region: tuple(path for path in paths if path in fitting) for region, paths in found}


def dense_layers(graph: Graph, region: Region) -> Iterator[tuple[str, str | None]]:
    """The linear layers and 2-d convolutions of a region: their path, and why a low-rank pair cannot stand for one (None: it can)."""
    readers = parameter_readers(graph)
    for node in region.nodes:
        layer = leaf(graph, node)
        if not isinstance(layer, Dense):
            continue
        why = None
        if type(layer) not in (nn.Linear, nn.Conv2d):
            why = f"{type(layer).__name__} computes something of its own"
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            why = f"its convolution has {layer.groups} groups"
        elif len(readers[id(layer.weight)]) > 1:
            why = "its weight is used more than once"
        elif not layer.weight.requires_grad:
            why = "it is frozen"
        elif f"{node.target}.weight" in graph.unused:
            why = "no gradient reaches it"
        yield str(node.target), why


def calls_of(edit: Editor, paths: Iterable[str], effects: Effects) -> dict[str, Node]:
    """The call of each leaf that `match` chose; a note in `effects`, where earlier passes have removed, frozen or shared it.

    Ask for all of them before the first edit: what reads a parameter is looked up anew in a graph that has changed.
    """
    readers, found = parameter_readers(edit.graph), {}
    for path in dict.fromkeys(paths):
        nodes = edit.calls(path)
        parameters = tuple(edit.graph.module.get_submodule(path).parameters()) if nodes else ()
        if not nodes:
            effects.skip(path, "an earlier pass has removed it")
        elif not all(p.requires_grad for p in parameters):
            effects.skip(path, "an earlier pass has frozen it")
        elif any(node not in nodes for p in parameters for node in readers.get(id(p), ())):
            effects.skip(path, "an earlier pass uses its weights elsewhere")
        else:
            found[path] = nodes[0]
    return found


def beside(graph: Graph, path: str, word: str) -> str:
    """A free path for a new layer next to a leaf, in the block that it belongs to: `layer1.0.conv1_blur`."""
    taken = graph.module.get_submodule(owner(path))._modules
    names = itertools.chain([f"{path}_{word}"], (f"{path}_{word}{number}" for number in itertools.count(2)))
    return next(name for name in names if name.rpartition(".")[2] not in taken)


def full_rank(weight: Tensor) -> int:
    """The largest rank of a weight, (out, in, ...), as a matrix of outputs by what each of them reads."""
    return min(weight.shape[0], weight[0].numel())


def low_rank_pair(layer: Dense, first: Tensor, second: Tensor) -> tuple[Dense, Dense]:
    """A layer that reads what `layer` reads, and one from there to its outputs, with these weights and without bias.

    The weights are (rank, in, ...) and (out, rank, ...), as `divide` gives them.
    """
    rank = len(first)
    inner: Dense
    outer: Dense
    # Without storage first: initial weights would be drawn from the generator that the backbone's own randomness comes from.
    if isinstance(layer, nn.Linear):
        inner, outer = (nn.Linear(n, m, bias=False, device="meta") for n, m in ((layer.in_features, rank), (rank, layer.out_features)))
    else:
        same: Any = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        inner = nn.Conv2d(layer.in_channels, rank, **same, bias=False, device="meta")
        outer = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device="meta")
    for made, weight in ((inner, first), (outer, second)):
        # As layers are made: sharded parameters have to be contiguous.
        made.weight = nn.Parameter(weight.to(layer.weight.device, layer.weight.dtype).contiguous())
        made.train(layer.training)
    return inner, outer


def zero_pair(layer: Dense, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights of a pair that computes zeros: the first as PyTorch initialises a layer's, from a generator of its own, the second zeros."""
    weight = layer.weight
    bound = 1 / math.sqrt(weight[0].numel())
    first = torch.empty(rank, *weight.shape[1:]).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return first, torch.zeros(len(weight), rank, *(1 for _ in weight.shape[2:]))


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """The weight, (out, in, ...), of the one layer that computes what a low-rank pair, (rank, in, ...) and (out, rank, ...), does."""
    return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])


def divide(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of weights of that rank whose product is nearest to `weight`, (out, in, ...), by its singular vectors; both of equal norm.

    Eckart and Young (1936). In float64, by the eigenvectors of the smaller Gram matrix, which take much less time than the singular values.
    """
    matrix = weight.detach().double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    rows = vectors.T @ matrix
    root = rows.norm(dim=1).sqrt()
    rows, vectors = rows / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None], vectors * root
    first, second = (rows, vectors) if wide else (vectors.T, rows.T)
    return (
        first.reshape(rank, *weight.shape[1:]).to(weight.dtype),
        second.reshape(len(weight), rank, *(1 for _ in weight.shape[2:])).to(weight.dtype),
    )


class GhostNorm(nn.Module):
    """Mixed into a batch norm: in training, each run of `samples` samples is normalised by its own mean and variance.

    Running statistics move by each of them in turn, as in Hoffer et al., algorithm 1. In eval mode it is the norm that it was.
    """

    samples: int

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) in and out. The last run takes what is left over, up to twice as many samples less one."""
        count = len(input) // self.samples if self.training else 1
        if count < 2:
            return super().forward(input)  # the norm's own
        edges = [i * self.samples for i in range(count)] + [len(input)]
        return torch.cat([super(GhostNorm, self).forward(input[a:b]) for a, b in pairwise(edges)])


_GHOSTS: dict[type[nn.Module], type[nn.Module]] = {
    norm: type(f"Ghost{norm.__name__}", (GhostNorm, norm), {"__module__": __name__})
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


def ghost_norm(norm: nn.Module | None, samples: int) -> nn.Module | None:
    """The same norm over runs of `samples` samples, sharing its tensors; None if it is no plain batch norm."""
    if norm is None or (kind := _GHOSTS.get(type(norm))) is None:
        return None
    ghost = kind.__new__(kind)
    ghost.__dict__ = {**norm.__dict__, "samples": samples}
    return ghost


class Blur(nn.Module):
    """A fixed low-pass filter of each channel, followed by every `stride`-th position: antialiased downsampling.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486), section 3: the outer product of a row of Pascal's
    triangle with itself, normalised to 1; the image is reflected at its borders. It has no parameters, and its buffer is not stored.
    """

    def __init__(self, size: int, stride: tuple[int, ...] = (1, 1)) -> None:
        super().__init__()
        row = torch.ones(1, dtype=torch.float64)
        for _ in range(size - 1):
            row = F.pad(row, (1, 0)) + F.pad(row, (0, 1))
        kernel = torch.outer(row, row)
        self.size, self.stride = size, stride
        self.kernel: Tensor
        self.register_buffer("kernel", (kernel / kernel.sum()).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        before, after = (self.size - 1) // 2, self.size // 2
        # A side of one position has nothing to reflect.
        x = F.pad(x, (before, after, before, after), "reflect" if min(x.shape[2:]) > after else "replicate")
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, groups=x.shape[1])

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}"
