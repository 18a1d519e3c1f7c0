"""Walks over a graph: what comes before and after, what lies between, and where every path crosses."""

from collections.abc import Callable, Iterable

import networkx as nx
import torch
from torch.fx import Node

from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations

Follow = Callable[[Node], bool]


def ancestors(nodes: Iterable[Node], follow: Follow | None = None) -> set[Node]:
    """`nodes` and everything that they are computed from. `follow` says whether to go on through a node (and to include it)."""
    return _reach(nodes, lambda node: node.all_input_nodes, follow)


def descendants(nodes: Iterable[Node], follow: Follow | None = None) -> set[Node]:
    """`nodes` and everything that is computed from them. `follow` as in `ancestors`."""
    return _reach(nodes, lambda node: node.users, follow)


def _reach(nodes: Iterable[Node], step: Callable[[Node], Iterable[Node]], follow: Follow | None) -> set[Node]:
    stack = list(nodes)
    found = set(stack)
    while stack:
        for node in step(stack.pop()):
            if node not in found and (follow is None or follow(node)):
                found.add(node)
                stack.append(node)
    return found


def between(starts: Iterable[Node], ends: Iterable[Node]) -> set[Node]:
    """Nodes on a path from one of `starts` to one of `ends`, both included where such a path exists."""
    return descendants(starts) & ancestors(ends)


def reentry(graph: Iterable[Node], nodes: Iterable[Node]) -> Node | None:
    """A node outside `nodes` on a path from one of them to another; None where the set is convex. `graph` gives all nodes in order."""
    inside = set(nodes)
    after: set[Node] = set()
    for node in graph:
        if node in inside:
            through = next((i for i in node.all_input_nodes if i in after), None)
            if through is not None:
                return through
        elif any(i in inside or i in after for i in node.all_input_nodes):
            after.add(node)
    return None


def is_convex(graph: Graph, nodes: Iterable[Node]) -> bool:
    """Whether no path leaves `nodes` and comes back, so that they can run as one unit."""
    return reentry(graph.nodes, nodes) is None


def slice_around(graph: Graph, nodes: Iterable[Node]) -> tuple[Node, ...]:
    """All nodes from the first of `nodes` to the last, in execution order; a convex set. The input and the output node are left out."""
    positions = [graph.order[n] for n in nodes]
    return tuple(n for n in graph.nodes[min(positions) : max(positions) + 1] if n.op not in ("placeholder", "output"))


def cut_points(graph: Graph) -> tuple[Node, ...]:
    """Activations that every path from input to output crosses (dominators of the output), in execution order.

    The input and the output node are left out. Only edges between activations count: scalars of shape arithmetic, and tensors made of
    parameters alone, can be computed again on either side of a cut.
    """
    return graph.cached(_cut_points)


def _cut_points(graph: Graph) -> tuple[Node, ...]:
    active = activations(graph)
    flow = nx.DiGraph()
    flow.add_node(graph.placeholder)
    for node in graph.nodes:
        if node in active or node.op == "output":
            flow.add_edges_from((i, node) for i in node.all_input_nodes if i in active)
    output = graph.output
    if output not in flow:
        return ()
    dominators = nx.immediate_dominators(flow, graph.placeholder)
    chain: list[Node] = []
    node = dominators.get(output)
    while node is not None and node is not graph.placeholder:
        if isinstance(node.meta.get("val"), torch.Tensor):
            chain.append(node)
        node = dominators.get(node)
    return tuple(reversed(chain))
