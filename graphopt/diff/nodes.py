"""The rewritten graph's nodes joined to the backbone's on origin, and what became of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from graphopt.diff.rows import NodeRow
from graphopt.diff.status import ranked
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, attribute
from graphopt.ir.shapes import SHAPE_BATCH


class Joined:
    """Two graphs of one backbone, node by node.

    Attributes:
        pairs: rewritten node -> base node. gone: base nodes without a partner, in order; `lost` the same as a set.
        fresh: rewritten nodes without one.
        grads: rewritten nodes that the backward of a training step reaches. active: those that carry activations.
    """

    def __init__(self, base: Graph, graph: Graph) -> None:
        self.base, self.graph = base, graph
        self.pairs = _pairs(base, graph)
        partners = set(self.pairs.values())
        self.gone = tuple(n for n in base.nodes if n not in partners and n.op not in ("placeholder", "output"))
        self.lost = set(self.gone)
        self.fresh = tuple(n for n in graph.nodes if n not in self.pairs and n.op not in ("placeholder", "output"))
        self.active = activations(graph)
        self.grads = _reached(graph, self.active)
        #: what passes put into the flow without changing it (a sign at a cut): shown as inserted, but nothing is rewired by it
        self.signs = {n for n in self.fresh if _is_sign(graph, n)}

    def statuses(self, node: fx.Node) -> tuple[str, ...]:
        """What became of a node of the rewritten graph."""
        before = self.pairs.get(node)
        if before is None:
            return ("inserted",)
        found = set()
        mine, theirs = parameters(self.graph, node), parameters(self.base, before)
        if any(p.requires_grad for p in theirs) and mine and not any(p.requires_grad for p in mine):
            found.add("frozen")
        if _what(self.graph, node) != _what(self.base, before) or self._inputs(node) != tuple(n.name for n in before.all_input_nodes):
            found.add("rewired")
        return ranked(found)

    def _inputs(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(self._source(n) for n in node.all_input_nodes)

    def _source(self, node: fx.Node) -> str:
        while node in self.signs:
            node = node.all_input_nodes[0]
        return self.pairs[node].name if node in self.pairs else f"+{node.name}"

    def row(self, node: fx.Node, statuses: tuple[str, ...] | None = None) -> NodeRow:
        """A node of the rewritten graph for the diff."""
        return describe(self.graph, node, self.active, self.statuses(node) if statuses is None else statuses)


def describe(graph: Graph, node: fx.Node, active: set[fx.Node], statuses: tuple[str, ...] = ("kept",)) -> NodeRow:
    origin = node.meta["origin"]
    return NodeRow(
        name=node.name,
        op=node.op,
        what=str(node.target).rpartition(".")[2] if node.op == "get_attr" else _what(graph, node),
        path=str(node.target) if node.op in ("call_module", "get_attr") else origin.path,
        call=origin.call,
        shape=shape(node, batched=node in active),
        inputs=tuple(n.name for n in node.all_input_nodes),
        statuses=statuses,
        by=node.meta.get("pass"),
        parameters=sum(p.numel() for p in parameters(graph, node)),
    )


def shape(node: fx.Node, *, batched: bool = True) -> tuple[str | int, ...] | None:
    """Shape of a node's output with the batch as "N" (windows of Swin: "64N"); None where it is no tensor.

    Args:
        batched: whether the first size is the batch's; not so for weights and what is made of them.
    """
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
        value = value[0]
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return None
    sizes: list[str | int] = [int(s) for s in value.shape]
    batch = int(value.shape[0])
    if batched and value.ndim > 1 and batch % SHAPE_BATCH == 0:
        sizes[0] = "N" if batch == SHAPE_BATCH else f"{batch // SHAPE_BATCH}N"
    return tuple(sizes)


def parameters(graph: Graph, node: fx.Node) -> list[nn.Parameter]:
    """The parameters that a node reads itself."""
    if node.op == "call_module":
        return list(graph.module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        value = attribute(graph.module, str(node.target))
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _is_sign(graph: Graph, node: fx.Node) -> bool:
    """Whether an inserted module gives back the very tensor it takes."""
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return False
    module = graph.module.get_submodule(str(node.target))
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    probe = torch.zeros(2, 2)
    try:
        with torch.no_grad():
            return module.forward(probe) is probe
    except Exception:  # whatever cannot take the probe is no mere sign
        return False


def _what(graph: Graph, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(graph.module.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def _pairs(base: Graph, graph: Graph) -> dict[fx.Node, fx.Node]:
    """By name and origin (a clone keeps both); what was renamed, by origin, operator and order."""
    named = {n.name: n for n in base.nodes}
    pairs: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same = named.get(node.name)
        if same is not None and "pass" not in node.meta and same.op == node.op and _origin(same) == _origin(node):
            pairs[node] = named.pop(node.name)
    left: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in named.values():
        left[_origin(node), node.op, str(node.target)].append(node)
    for node in graph.nodes:
        if node not in pairs and "pass" not in node.meta and (queue := left.get((_origin(node), node.op, str(node.target)))):
            pairs[node] = queue.pop(0)
    return pairs


def _origin(node: fx.Node) -> Any:
    return None if node.op in ("placeholder", "output") else node.meta["origin"]


def _reached(graph: Graph, active: set[fx.Node]) -> set[fx.Node]:
    """Nodes that the backward reaches. What enters a stretch with a backward of its own enters detached."""
    stretch = {n: number for number, s in enumerate(graph.sections) if s.target for n in s.nodes}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs: Iterable[fx.Node] = node.all_input_nodes
        if node in stretch:
            inputs = [i for i in inputs if i not in active or stretch.get(i) == stretch[node]]
        if any(i in found for i in inputs) or any(p.requires_grad for p in parameters(graph, node)):
            found.add(node)
    return found
