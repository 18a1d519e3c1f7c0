"""The stretch of the graph between two marks: which nodes it holds, and which parameters it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, attribute
from graphopt.ir.section import Section


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
    """What leads to `end` and not to `start`, in execution order, with what is done there for its effect alone (in place, assertions)
    and the shapes that are read there.

    Tensors made of parameters alone belong to it only if nothing else uses them: the root computes those that two modules share.
    """
    assert end is not None
    inside = _done_by(graph, end)
    if start is not None:
        inside -= _done_by(graph, start)
    active, from_input = activations(graph), set(_behind(graph))
    kept: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in active or node in from_input or all(u in kept for u in node.users)):
            kept.add(node)
    return tuple(n for n in graph.nodes if n in kept)


def divide_sections(graph: Graph, stretches: Sequence[Section]) -> None:
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
    queue, seen, active = list(nodes), set(nodes), activations(graph)
    while queue:
        node = queue.pop()
        if node.op == "call_module":
            yield from graph.module.get_submodule(node.target).parameters()
        elif node.op == "get_attr" and isinstance(value := attribute(graph.module, node.target), nn.Parameter):
            yield value
        for other in node.all_input_nodes:
            # What the root computes for it of parameters alone.
            if other not in seen and other not in active:
                seen.add(other)
                queue.append(other)


def _done_by(graph: Graph, end: fx.Node) -> set[fx.Node]:
    """What has run when an activation is there: all that leads to it, and what hangs on that alone without leading anywhere else."""
    used = _leading_to(graph.output)
    done = {n for n in _leading_to(end) if n.op != "placeholder"}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node not in used and any(n in done for n in sources):
            done.add(node)
        elif node.op != "output" and _is_number(node) and sources and all(n in done for n in sources):
            # A shape read here for later: the numbers leave the module, not the activation they were read from.
            done.add(node)
    return done


def _is_number(node: fx.Node) -> bool:
    """Whether it is a number of shape arithmetic, or several."""
    return "val" in node.meta and not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta["val"]))


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
