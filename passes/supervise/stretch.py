"""The stretch of the graph between two marks, looked up when it is asked for: passes that come later may put other nodes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from graphopt.errors import PassError
from graphopt.regions import activations, attribute
from graphopt.rewriting.sections import Section
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
    """What leads to `end` and not to `start`, in execution order, with what is done there for its effect alone (in place, assertions).

    Tensors made of parameters alone belong to it only if nothing else uses them: the root computes those that two modules share.
    """
    assert end is not None
    inside = _leading_to(end)
    if start is not None:
        inside -= _leading_to(start)
    used, active, from_input = _leading_to(graph.output), activations(graph), set(_behind(graph))
    inside = {n for n in inside if n.op != "placeholder"}
    for node in graph.nodes:
        if node not in used and any(n in inside for n in node.all_input_nodes):
            inside.add(node)
    kept: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in active or node in from_input or all(u in kept for u in node.users)):
            kept.add(node)
    return tuple(n for n in graph.nodes if n in kept)


def divide_sections(graph: Graph, stretches: Sequence[Stretch]) -> None:
    """Earlier passes' sections that reach over a boundary (a frozen prefix, a checkpointed run) are divided there, so that all nest."""
    held = [set(s.nodes) for s in stretches]
    divided: list[Section] = []
    for section in graph.sections:
        groups: dict[int | None, list[fx.Node]] = {}
        for node in section.nodes:
            groups.setdefault(next((i for i, nodes in enumerate(held) if node in nodes), None), []).append(node)
        pieces = [tuple(g) for g in groups.values() if any(n.op != "get_attr" for n in g)]
        if len(pieces) < 2 or section.target:
            divided.append(section)
        else:
            divided += [replace(section, name=f"{section.name}_{number}", nodes=piece) for number, piece in enumerate(pieces)]
    graph.sections[:] = divided


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
