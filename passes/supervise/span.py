"""The part of a graph between two boundaries: which nodes it holds, and which parameters it reads."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, parameters_read


def find_boundary(graph: Graph, path: str) -> Node:
    """The node that calls the boundary at `path`.

    Raises:
        PassError: another pass removed it.
    """
    for node in graph.nodes:
        if node.op == "call_module" and node.target == path:
            return node
    raise PassError(f"another pass removed the boundary {path}", where="supervise", fix="Put supervise after it, or cut elsewhere")


def nodes_between(graph: Graph, start: Node | None, end: Node) -> tuple[Node, ...]:
    """What leads to `end` and not to `start` (None: the input), in execution order.

    That includes what is done there for its effect alone (in place, assertions) and the shapes that are read there. Tensors made of
    parameters alone belong to it only if nothing else uses them: the root computes those that two modules share.
    """
    inside = _done_by(graph, end)
    if start is not None:
        inside -= _done_by(graph, start)
    from_input = descendants([graph.placeholder])
    members: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inside and (node in from_input or all(u in members for u in node.users)):
            members.add(node)
    return tuple(n for n in graph.nodes if n in members)


def parameters_between(graph: Graph, start: Node | None, end: Node) -> Iterator[nn.Parameter]:
    """The parameters that are read between two boundaries, by leaves or through what the root computes of parameters alone."""
    active, nodes = activations(graph), nodes_between(graph, start, end)
    for node in ancestors(nodes, lambda n: n not in active):
        for _, parameter in parameters_read(graph.module, node):
            yield parameter


def _done_by(graph: Graph, end: Node) -> set[Node]:
    """What has run when an activation is there: all that leads to it, and what depends on that alone and leads nowhere else."""
    used = ancestors([graph.output])
    done = {n for n in ancestors([end]) if n.op != "placeholder"}
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node not in used and any(n in done for n in sources):
            done.add(node)
        elif node.op != "output" and is_number(node) and sources and all(n in done for n in sources):
            # A shape that is read here for later: the numbers leave the module, not the activation that they were read from.
            done.add(node)
    return done


def is_number(node: Node) -> bool:
    """Whether it is a number of shape arithmetic, or several."""
    return "val" in node.meta and not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta["val"]))
