"""Both sides of a cut: the prefix that computes cached features, with their keys, and training on them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch, ImageFeed, epoch_order
from graphopt.errors import RunError
from graphopt.hashing import hash_parts, raw_bytes
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute, parameters_read
from graphopt.runtime.dtypes import dtype_name
from graphopt.runtime.quantized import pack, unpack
from graphopt.train.feature_cache.crops import Crops
from graphopt.train.feature_cache.exchange import Exchange
from graphopt.train.feature_cache.store import CacheEntry, EntryLayout
from graphopt.train.strategy import Strategy

#: batches that are read ahead of the step
AHEAD = 2


class Declined(Exception):
    """The features will not be cached; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A cut of a plan, the layout of its features as they are stored, and the shape that they have for one sample."""

    node: Node
    layout: EntryLayout
    shape: tuple[int, ...]


def computing(start: Node | None, stop: Node) -> set[Node]:
    """The nodes that compute `stop` from `start` (from the input, for None); `stop` is one of them, `start` is not."""
    return ancestors([stop], lambda node: node is not start and node.op != "placeholder")


def key_of(graph: Graph, start: Node | None, stop: Node, parent: str, options: Sequence[object]) -> str:
    """The key of the features at `stop`, which depend on those at `start` (or images) with the key `parent`, nodes, tensors and options."""
    inside = computing(start, stop)
    ordered = [n for n in graph.nodes if n in inside]
    text = [f"{n.op} {_name(n.target)} {n.args} {n.kwargs}" for n in ordered]
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


def _name(target: object) -> str:
    """A node's target, the same in every process: a function's text form has its address."""
    name = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', None)}.{name}" if name else str(target)


class Prefix:
    """Computes the features of the last of several cuts, from images or the features of the cut before. Raises RunError if it trains."""

    def __init__(self, plan: Plan, cuts: Sequence[Cut], strategy: Strategy) -> None:
        nodes = computing(None, cuts[-1].node)
        training = next((name for n in nodes for name, p in parameters_read(plan.graph.module, n) if p.requires_grad), None)
        if training is not None:
            raise RunError(f"the prefix still trains ({training}): its features cannot be cached", where="features")
        self.layout, self._shape, self._strategy = cuts[-1].layout, cuts[-1].shape, strategy
        self._squares = 0.0, 0.0  # of errors, and of values, where they are stored in eight bits
        self._module = emit(plan.graph, start=cuts[-2].node if len(cuts) > 1 else None, stop=cuts[-1].node)
        strategy.to_device(self._module)

    def compute(self, inputs: Tensor) -> Tensor:
        batch = self._strategy.move(Batch(torch.empty(0), inputs, torch.empty(0)))
        with torch.no_grad(), self._strategy.autocast():
            return self._module(batch.input.float())

    def stored(self, inputs: Tensor, *, first: bool) -> Tensor:
        """Features of `inputs` as they are stored; the first ones are checked."""
        features = self.compute(inputs)
        if first:
            self.check(inputs, features)
        return self.convert(features)

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
        if dtype == torch.uint8:
            packed, values = pack(features), features.double()
            errors, sums = (unpack(packed, self._shape) - values).square().sum(), values.square().sum()
            self._squares = self._squares[0] + float(errors), self._squares[1] + float(sums)
            return packed.cpu()
        stored = features.to(dtype)
        if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(features).all()):
            raise Declined(f"their values go beyond {dtype_name(dtype)}")
        return stored.cpu()

    @property
    def error(self) -> float | None:
        """Root mean square of the error that eight bits have made so far, over that of the values; None for other dtypes."""
        errors, values = self._squares
        return (errors / values) ** 0.5 if values else None


class OnFeatures(nn.Module):
    """The part of a network that is trained on cached features. Without autocast it computes in float32."""

    def __init__(self, suffix: nn.Module) -> None:
        super().__init__()
        self.suffix = suffix

    def forward(self, features: Tensor, *more: Any) -> Any:
        return self.suffix(features.float(), *more)


class FeatureFeed:
    """Batches of cached features in the order of the images' feed, a thread reads ahead. The entry has all first views, then all second.

    On several ranks the entry has the samples that this rank owns, and the thread exchanges features with the other ranks.
    """

    def __init__(
        self,
        entry: CacheEntry,
        images: ImageFeed,
        views: int = 1,
        exchange: Exchange | None = None,
        packed: tuple[int, ...] | None = None,
        crops: Crops | None = None,
    ) -> None:
        """`packed` is the shape of one sample's features where the entry has them in eight bits; `crops` are taken of each."""
        self._packed, self._crops = packed, crops
        self.entry, self._images, self._views, self._exchange = entry, images, views, exchange
        self.refresh: Callable[[int], None] = lambda epoch: None  # noqa: ARG005 (brings the entry to the views of an epoch)

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """A sample's views alternate from epoch to epoch."""
        self.refresh(epoch)
        images = self._images
        rank, size, own = images.rank, images.batch, self.entry.layout.rows // self._views
        order = torch.tensor(epoch_order(len(images.samples), images.seed, epoch))
        crop = self._crops.of(epoch) if self._crops else lambda features, _: features
        failed: list[Exception] = []

        def load(number: int) -> Batch:
            # After a failure this rank leaves; an exchange of a later batch would meet that of an earlier one elsewhere.
            if failed:
                raise failed[0]
            try:
                return read(number)
            except Exception as error:
                failed.append(error)
                raise

        def read(number: int) -> Batch:
            wanted = [order[other :: rank.count][number * size : (number + 1) * size] for other in range(rank.count)]
            index = torch.cat([samples[samples % rank.count == rank.number] for samples in wanted])
            rows = index // rank.count + (epoch + index) % self._views * own
            features, targets = self.entry.features.index_select(0, rows), self.entry.targets[rows]
            if self._exchange is not None:
                features, targets = self._exchange.batch(wanted, features, targets)
            if self._packed is not None:
                features = unpack(features, self._packed)
            features = crop(features, wanted[rank.number])
            return Batch(wanted[rank.number], features.pin_memory() if images.pin else features, targets)

        with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
            ahead: deque[Future[Batch]] = deque()
            for number in range(start, len(self)):
                ahead.append(pool.submit(load, number))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
