"""What kept features are of: a name that changes with anything they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from graphopt.ir.graph import Graph
from graphopt.train.feature_cache.store import bits


def between(start: fx.Node | None, stop: fx.Node) -> set[fx.Node]:
    """The nodes that compute `stop` from `start` (from the input, for None); `stop` is one of them, `start` is not."""
    found = {stop}
    stack = [stop]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is not start and node not in found and node.op != "placeholder":
                found.add(node)
                stack.append(node)
    return found


def tensors(module: nn.Module, nodes: Iterable[fx.Node]) -> dict[str, Tensor]:
    """Every parameter and buffer that nodes of a flat graph read, by name."""
    found: dict[str, Tensor] = {}
    for node in nodes:
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            found |= {f"{node.target}.{n}": t for n, t in (*part.named_parameters(), *part.named_buffers())}
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(path), name)
            if isinstance(value, Tensor):
                found[str(node.target)] = value
    return found


def key_of(graph: Graph, start: fx.Node | None, stop: fx.Node, parent: str, options: Sequence[object]) -> str:
    """The key of features at `stop`, computed from those that have the key `parent` and stand at `start`, or from images."""
    inside = between(start, stop)
    ordered = [n for n in graph.nodes if n in inside]
    text = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in ordered]
    # What a leaf computes depends on more than its tensors: its class, and what it says of itself.
    text += [str(graph.module.get_submodule(str(n.target))) for n in ordered if n.op == "call_module"]
    found = tensors(graph.module, ordered)
    values = (bytes(bits(found[name].detach().cpu())) for name in sorted(found))
    return hashed("\n".join([parent, *map(str, options), *text]).encode(), *values)


def hashed(*parts: bytes) -> str:
    """32 hex digits of all parts in turn, and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def row_bytes(node: fx.Node, dtype: torch.dtype) -> int:
    """Bytes of one sample's features at a node."""
    return int(node.meta["val"][0].numel()) * dtype.itemsize
