"""Nodes as the diff shows them, what flows between rows, how far the backward pass comes, and what each row costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from graphopt.cost.figures import BLOCK_FIGURES, FIGURES, Cost
from graphopt.diff.locate import RowMap
from graphopt.diff.model import NodeRow, RowLocation, Shape
from graphopt.hashing import hash_parts
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, leaf, parameters_read, trainable
from graphopt.ir.shapes import SHAPE_BATCH

Edge = tuple[str, str]


def edges_between_rows(graph: Graph, name_of: Callable[[Node], str | None]) -> tuple[Edge, ...]:
    """Pairs of rows over which activations flow, in execution order."""
    active = activations(graph)
    pairs = ((name_of(i), name_of(n)) for n in graph.nodes if n in active for i in n.all_input_nodes if i in active)
    return tuple(dict.fromkeys((a, b) for a, b in pairs if a is not None and b is not None and a != b))


def reached_by_backward(graph: Graph) -> set[Node]:
    """Activations that the backward pass reaches. What enters a section with a loss of its own enters it detached."""
    active = activations(graph)
    section_of = {n: number for number, s in enumerate(graph.sections) if s.target for n in s.nodes}
    found: set[Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node in section_of:
            inputs = [i for i in inputs if i not in active or section_of.get(i) == section_of[node]]
        if trainable(graph, node) or any(i in found for i in inputs):
            found.add(node)
    return found & active


def input_shape(graph: Graph, nodes: Sequence[Node]) -> Shape | None:
    """Shape of the first activation that some nodes take from outside."""
    active, inside = activations(graph), set(nodes)
    return next((shape(i) for n in nodes if n in active for i in n.all_input_nodes if i not in inside and i in active), None)


def output_shape(graph: Graph, nodes: Sequence[Node]) -> Shape | None:
    """Shape of the last activation that is used outside of some nodes."""
    active, inside = activations(graph), set(nodes)
    return next((shape(n) for n in reversed(nodes) if n in active and any(u not in inside for u in n.users)), None)


def figures(cost: Cost | None, rows: Sequence[RowLocation], graph: Graph, nodes: Sequence[Sequence[Node]]) -> dict[str, dict[str, int]]:
    """Each row's share of a training step; without a cost, its parameters alone, each counted where it is first read."""
    if cost is not None:
        found = {b.path: {name: int(getattr(b, name)) for name in BLOCK_FIGURES} for b in cost.by([r for r in rows if r.paths])}
        return {r.name: found.get(r.name, dict.fromkeys(BLOCK_FIGURES, 0)) for r in rows}
    seen: set[nn.Parameter] = set()
    # Heads with a local loss are added by passes, and called outside of the graph.
    added = {path: part for path, part in graph.module.named_modules() if path not in graph.types}
    result = {}
    for row, inside in zip(rows, nodes, strict=True):
        # A neighbour's weight that a pass reads here counts at the neighbour.
        own = [n for n in inside if n.op != "get_attr" or "pass" not in n.meta]
        read = {p for n in own for _, p in parameters_read(graph.module, n)}
        outside = () if inside else [added[path] for path in row.paths if path in added]
        fresh = read.union(*(part.parameters() for part in outside)) - seen
        seen |= fresh
        result[row.name] = {
            "parameters": sum(p.numel() for p in fresh),
            "trainable_parameters": sum(p.numel() for p in fresh if p.requires_grad),
        }
    return result


def totals(cost: Cost | None) -> dict[str, int] | None:
    """The figures of a whole training step."""
    return None if cost is None else {f.name: int(getattr(cost, f.name)) for f in FIGURES}


def describe(graph: Graph, node: Node, statuses: tuple[str, ...]) -> NodeRow:
    """A node of a graph for the diff."""
    origin = node.meta["origin"]
    path = str(node.target) if node.op in ("call_module", "get_attr") else origin.path
    sizes, inputs = shape(node, batched=node in activations(graph)), tuple(n.name for n in node.all_input_nodes)
    parameters = sum(p.numel() for _, p in parameters_read(graph.module, node))
    if node.op == "call_module":
        module = leaf(graph, node)
        what, settings = type(module).__name__, module.extra_repr() if module is not None else ""
    else:
        what = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else str(node.target).rpartition(".")[2]
        settings = repr(_constants([node.args, node.kwargs]))
    return NodeRow(node.name, node.op, what, path, origin.call, sizes, inputs, statuses, node.meta.get("pass"), parameters, settings)


def _constants(value: Any) -> list[Any]:
    """The plain values among the arguments of a node, in order."""
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        return [plain for item in value for plain in _constants(item)]
    return [value] if value is None or isinstance(value, (bool, int, float, str, torch.dtype)) else []


def structures(base: Graph) -> dict[str, tuple[str, str]]:
    """By row, digests of what its nodes compute in a backbone, in order: with shapes, numbers of parameters and settings, and without."""
    rows = base.cached(RowMap)
    inside: dict[str, list[NodeRow]] = {}
    for node in base.nodes:
        if (index := rows.of(node)) is not None:
            inside.setdefault(rows.rows[index].name, []).append(describe(base, node, ()))
    plain = {name: [(n.op, n.what, n.shape, n.parameters, n.settings) for n in nodes] for name, nodes in inside.items()}
    return {name: (_digest(found), _digest([entry[:2] for entry in found])) for name, found in plain.items()}


def _digest(value: object) -> str:
    return hash_parts(repr(value).encode())


def shape(node: Node, *, batched: bool = True) -> Shape | None:
    """Shape of a node's output with the batch, if it is `batched`, as "N" (windows of Swin: "64N"); None where it is no tensor."""
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
