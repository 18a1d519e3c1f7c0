"""The prefix that computes cached features, their keys, and checks that they may be cached at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute, parameters_read
from graphopt.runtime.dtypes import dtype_name
from graphopt.train.feature_cache.store import EntryLayout
from graphopt.train.hashing import hash_parts, raw_bytes
from graphopt.train.strategy import Strategy


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
