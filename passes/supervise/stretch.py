"""The stretch of the graph between two marks, looked up when it is asked for: passes that come later may put other nodes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from graphopt.errors import PassError
from graphopt.regions import activations, attribute
from graphopt.trace import Graph


@dataclass(frozen=True, eq=False)
class Stretch:
    """A `graphopt.rewriting.sections.Section` whose nodes are those between two marks (module paths) of the graph as it stands."""

    name: str
    graph: Graph
    start: str | None
    end: str
    wrap: Callable[[fx.GraphModule], nn.Module]
    by: str
    image: bool
    target: bool = True
    splits: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return members_between(self.graph, mark(self.graph, self.start), mark(self.graph, self.end))


def mark(graph: Graph, path: str | None) -> fx.Node | None:
    """The node of a mark.

    Raises:
        PassError: another pass took it away.
    """
    if path is None:
        return None
    for node in graph.nodes:
        if node.op == "call_module" and node.target == path:
            return node
    raise PassError(f"another pass took away the boundary {path}", where="pass supervise", fix="Put supervise after it, or cut elsewhere")


def members_between(graph: Graph, start: fx.Node | None, end: fx.Node | None) -> tuple[fx.Node, ...]:
    """What leads to `end` and not to `start`, in execution order.

    Tensors made of parameters alone belong to it only if nothing else uses them: the root computes those that two modules share.
    """
    assert end is not None
    inside = _leading_to(end)
    if start is not None:
        inside -= _leading_to(start)
    active = activations(graph)
    from_input = set(_behind(graph))
    kept: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node not in inside or node.op == "placeholder":
            continue
        if node in active or node in from_input or all(u in kept for u in node.users):
            kept.add(node)
    return tuple(n for n in graph.nodes if n in kept)


def parameters_in(graph: Graph, start: str | None, end: str) -> Iterator[nn.Parameter]:
    """The parameters that a stretch reads, its own leaves' and those the root reads for it."""
    nodes = members_between(graph, mark(graph, start), mark(graph, end))
    queue, seen = list(nodes), set(nodes)
    inside = set(nodes)
    while queue:
        node = queue.pop()
        if node.op == "call_module":
            yield from graph.module.get_submodule(node.target).parameters()
        elif node.op == "get_attr" and isinstance(value := attribute(graph.module, node.target), nn.Parameter):
            yield value
        for other in node.all_input_nodes:
            made_of_parameters = other not in inside and other not in seen and other not in activations(graph)
            if made_of_parameters:
                seen.add(other)
                queue.append(other)


def _leading_to(node: fx.Node) -> set[fx.Node]:
    found, queue = {node}, [node]
    while queue:
        for other in queue.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                queue.append(other)
    return found


def _behind(graph: Graph) -> Iterator[fx.Node]:
    """What is computed from the input, shape arithmetic included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
            yield node
