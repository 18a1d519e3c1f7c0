"""What flows between rows, how far the backward pass comes, and what each row costs."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.fx import Node

from graphopt.cost.figures import BLOCK_FIGURES, FIGURES, Cost
from graphopt.diff.locate import RowLocation
from graphopt.diff.model import Shape
from graphopt.diff.nodes import shape
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, parameters_read, trainable

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
    result = {}
    for row, inside in zip(rows, nodes, strict=True):
        # A neighbour's weight that a pass reads here counts at the neighbour.
        own = [n for n in inside if n.op != "get_attr" or "pass" not in n.meta]
        fresh = {p for n in own for _, p in parameters_read(graph.module, n)} - seen
        seen |= fresh
        result[row.name] = {
            "parameters": sum(p.numel() for p in fresh),
            "trainable_parameters": sum(p.numel() for p in fresh if p.requires_grad),
        }
    return result


def totals(cost: Cost | None) -> dict[str, int] | None:
    """The figures of a whole training step."""
    return None if cost is None else {f.name: int(getattr(cost, f.name)) for f in FIGURES}
