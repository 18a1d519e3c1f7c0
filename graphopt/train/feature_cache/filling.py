"""Filling the feature cache: the prefix that computes features, their keys, and checks that they may be cached at all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch, ImageFeed, load
from graphopt.errors import RunError
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute, parameters_read
from graphopt.runtime.dtypes import dtype_name
from graphopt.train.feature_cache.store import CacheEntry, EntryLayout, Fill
from graphopt.train.hashing import hash_parts, raw_bytes
from graphopt.train.strategy import Strategy

#: chunks that are timed before deciding whether the cache is faster than the prefix
TRIAL = 4

Chunk = tuple[Tensor, Tensor]


class Declined(Exception):
    """The features will not be cached; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A cut of a plan, and the layout of its features."""

    node: Node
    layout: EntryLayout


def computing(start: Node | None, stop: Node) -> set[Node]:
    """The nodes that compute `stop` from `start` (from the input, for None); `stop` is one of them, `start` is not."""
    return ancestors([stop], lambda node: node is not start and node.op != "placeholder")


def key_of(graph: Graph, start: Node | None, stop: Node, parent: str, options: Sequence[object]) -> str:
    """The key of the features at `stop`, computed from those at `start`, or from images, that have the key `parent`.

    It changes with everything that the features depend on.
    """
    inside = computing(start, stop)
    ordered = [n for n in graph.nodes if n in inside]
    text = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in ordered]
    leaves: list[str] = []
    tensors: dict[str, Tensor] = {}
    for node in ordered:
        path = str(node.target)
        if node.op == "call_module":
            leaf = graph.module.get_submodule(path)
            # A leaf's output depends on its class and its settings, too, which its text form has.
            leaves.append(str(leaf))
            tensors |= {**dict(leaf.named_parameters(prefix=path)), **dict(leaf.named_buffers(prefix=path))}
        elif node.op == "get_attr" and isinstance(value := attribute(graph.module, path), Tensor):
            tensors[path] = value
    values = (bytes(raw_bytes(tensors[name].cpu())) for name in sorted(tensors))
    return hash_parts("\n".join([parent, *map(str, options), *text, *leaves]).encode(), *values)


class Prefix:
    """Computes the features of the last of several cuts, from images or from the features of the cut before it.

    Raises RunError if it still trains.
    """

    def __init__(self, plan: Plan, cuts: Sequence[Cut], strategy: Strategy) -> None:
        nodes = computing(None, cuts[-1].node)
        training = next((name for n in nodes for name, p in parameters_read(plan.graph.module, n) if p.requires_grad), None)
        if training is not None:
            raise RunError(f"the prefix still trains ({training}): its features cannot be cached", where="features")
        self.layout, self._strategy = cuts[-1].layout, strategy
        self._module = emit(plan.graph, start=cuts[-2].node if len(cuts) > 1 else None, stop=cuts[-1].node)
        strategy.to_device(self._module)

    def compute(self, inputs: Tensor) -> Tensor:
        """The features of a batch, on the device."""
        batch = self._strategy.move(Batch(torch.empty(0), inputs, torch.empty(0)))
        with torch.no_grad(), self._strategy.autocast():
            return self._module(batch.input.float())

    def check(self, inputs: Tensor, features: Tensor) -> None:
        """Raises RunError unless features depend on nothing but their own sample."""
        again = self.compute(inputs)
        half = self.compute(inputs[: max(1, len(inputs) // 2)])
        # Kernels may round differently from call to call, or by batch size; dropout and batch statistics differ by far more.
        scale = 1e-2 * float(features.float().abs().max())
        for other, what in ((again, "draws random numbers"), (half, "mixes the samples of a batch")):
            if not bool((other.float() - features[: len(other)].float()).abs().max() <= scale):
                raise RunError(f"the prefix {what}: its features cannot be cached", where="features")

    def convert(self, features: Tensor) -> Tensor:
        """Features as they are stored. Raises Declined if a value is too large for the dtype."""
        dtype = self.layout.dtype
        stored = features.to(dtype)
        if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(features).all()):
            raise Declined(f"their values go beyond {dtype_name(dtype)}")
        return stored.cpu()


def fill_entry(
    fill: Fill,
    prefix: Prefix,
    chunks: Iterator[Chunk],
    *,
    trial: bool,
    clock: Callable[[], float],
    progress: Callable[[int, int], None],
    figures: dict[str, Any],
) -> CacheEntry:
    """Computes all chunks from `fill.done` on.

    Args:
        chunks: (inputs, targets) of each.
        trial: give up if, after a few chunks, reading features turns out to be slower than computing them.
        progress: called with (rows done, rows) after each chunk; may raise an exception to stop.
        figures: gets what the trial has measured, and how long filling took.

    Raises:
        Declined: see `trial` and `Prefix.convert`; what was written is removed.
        OSError: there is no room; likewise.
    """
    last = min(TRIAL, fill.layout.chunks - 1)
    began = start = clock()
    try:
        for number, (inputs, targets) in enumerate(chunks, fill.done):
            features = prefix.compute(inputs)
            if number == 0:
                prefix.check(inputs, features)
            fill.write(number, prefix.convert(features), targets)
            if number == 0:
                start = clock()  # the first chunk was computed three times, and warmed the kernels up
            elif number == last and trial and fill.done == 0:
                _check_faster(fill, last, clock() - start, clock, figures)
            progress(fill.layout.span(number)[1], fill.layout.rows)
    except (OSError, Declined):
        fill.discard()
        raise
    except BaseException:
        fill.flush()
        raise
    figures["fill_seconds"] = clock() - began
    return fill.finish()


def _check_faster(fill: Fill, last: int, computing: float, clock: Callable[[], float], figures: dict[str, Any]) -> None:
    """Reads back, in random order, the chunks from 1 to `last`, which took `computing` seconds to compute."""
    begin, end = fill.layout.span(1)[0], fill.layout.span(last)[1]
    order = begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(0))
    began = clock()
    for rows in torch.split(order, fill.layout.chunk):
        fill.read(rows)
    reading, computing = (clock() - began) / len(order), computing / len(order)
    figures |= {"compute_seconds_per_sample": computing, "read_seconds_per_sample": reading}
    if reading >= computing:
        times = f"reading them takes {1e6 * reading:.0f} us a sample, computing them {1e6 * computing:.0f} us"
        raise Declined(f"{times} (force = true caches them nevertheless)")


def chunks_of_images(images: ImageFeed, fill: Fill) -> Iterator[Chunk]:
    """The samples that are still to be computed, in order, all of one view before the next."""
    count = len(images.samples)
    keys = ([divmod(row, count) for row in range(*span)] for span in fill.missing)
    return ((batch.input, batch.target) for batch in load(images.samples, keys, images.workers))


def chunks_of_entry(source: CacheEntry, fill: Fill) -> Iterator[Chunk]:
    """The features of an earlier cut from which those of `fill` are still to be computed, in order."""
    return ((source.features[first:end], source.targets[first:end]) for first, end in fill.missing)
