"""Structures inside a block that passes look for: residual sums."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import leaf, overwriter
from graphopt.ir.regions import Region

#: functions and methods that add two tensors
_SUMS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
#: methods that give another view of a tensor with its elements in the same order
VIEWS = frozenset({"reshape", "view", "flatten", "contiguous"})
_ACTIVATIONS: frozenset[Any] = frozenset({F.relu, torch.relu, F.relu_, torch.relu_, F.gelu, F.silu, "relu", "relu_"})


class NotResidualError(Exception):
    """A block is not made of residual sums; the text says why, for a diagnostic about the block."""


@dataclass(frozen=True)
class Residual:
    """One residual sum of a block: `sum = shortcut + branch`.

    Attributes:
        sum: the node that adds. shortcut: the activation that it passes on unchanged. branch: the one that it adds.
        nodes: what computes the branch from the shortcut, in execution order.
    """

    sum: Node
    shortcut: Node
    branch: Node
    nodes: tuple[Node, ...]


def residuals(graph: Graph, block: Region) -> tuple[Residual, ...]:
    """The residual sums of a block with identity shortcuts, in execution order.

    ResNet's blocks have one, transformer blocks two. Between the sums and after the last there is nothing but elementwise activations and
    views, so that a block without its branches passes its input on.

    Raises:
        NotResidualError: the block computes something else, changes its input's shape, or its branches cannot be separated from the rest.
    """
    if not block.closed:
        raise NotResidualError("it is not closed: more than one tensor goes in or comes out")
    current, end = block.entries[0], block.exits[0]
    if _shape(current) != _shape(end):
        raise NotResidualError(f"it is not shape-preserving: {_shape(current)} goes in, {_shape(end)} comes out")
    inside = set(block.nodes)
    found: list[Residual] = []
    while current is not end:
        residual = _residual_at(graph, current, inside)
        users = [u for u in current.users if u in inside and isinstance(u.meta.get("val"), Tensor)]
        if residual is not None:
            found.append(residual)
            current = residual.sum
        elif len(users) == 1 and _passes_on(graph, users[0]):
            current = users[0]
        else:
            break
    if current is not end or not found:
        raise NotResidualError("it has no identity shortcut around what it computes")
    return tuple(found)


def _residual_at(graph: Graph, shortcut: Node, inside: set[Node]) -> Residual | None:
    """The first sum inside a block of an activation and a branch that is computed from it."""
    for node in sorted(inside, key=graph.order.__getitem__):
        if node.op == "call_module" or node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
            continue
        others = [a for a in node.args if not _is_same(graph, a, shortcut, inside)]
        branch = others[0] if len(others) == 1 else None
        if not isinstance(branch, Node):
            continue
        nodes = ancestors([branch], follow=lambda n: n in inside and n is not shortcut)
        if any(shortcut in n.all_input_nodes for n in nodes):
            return _separable(graph, node, shortcut, branch, nodes)
    return None


def _separable(graph: Graph, node: Node, shortcut: Node, branch: Node, nodes: set[Node]) -> Residual:
    # What nothing reads in the end (the rest of an unpacked shape, an assertion on it) is part of the branch.
    alive = ancestors([graph.output])
    nodes = descendants(nodes, follow=lambda n: n not in alive)
    if any(u not in nodes and u is not node for n in nodes for u in n.users):
        raise NotResidualError(f"its branch is used elsewhere than in {node}")
    if _shape(branch) != _shape(shortcut):
        raise NotResidualError("its branch has another shape than its shortcut")
    if overwriter(graph, shortcut) in nodes:
        raise NotResidualError("its branch changes its shortcut in place")
    return Residual(node, shortcut, branch, tuple(sorted(nodes, key=graph.order.__getitem__)))


def _is_same(graph: Graph, summand: Any, shortcut: Node, inside: set[Node]) -> bool:
    """Whether a summand is the shortcut, or passes it on through identity modules."""
    while summand is not shortcut and isinstance(summand, Node) and summand in inside and isinstance(leaf(graph, summand), nn.Identity):
        summand = summand.args[0]
    return summand is shortcut


def _passes_on(graph: Graph, node: Node) -> bool:
    """Whether a node between two sums, or after the last, is only an activation or another view of the same."""
    if node.op == "call_module":
        return isinstance(leaf(graph, node), nn.ReLU | nn.GELU | nn.SiLU | nn.Identity)
    return node.target in _ACTIVATIONS or (node.op == "call_method" and node.target in VIEWS)


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
