"""Structures that passes look for in a region: sums of a shortcut and a branch, and attention."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, leaf, parameters_of
from graphopt.ir.paths import is_below, owner
from graphopt.ir.regions import Region
from graphopt.runtime.by_mode import ByMode

#: what adds two tensors
ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "__matmul__")


# -- sums -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightedSum:
    """A sum of a shortcut and a branch with parameters.

    Attributes:
        sum: the addition. shortcut, branch: its operands.
        nodes: what computes the branch and not the shortcut, in execution order.
        projected: whether the shortcut has parameters too; then which operand counts as the branch means nothing.
    """

    sum: Node
    shortcut: Node
    branch: Node
    nodes: tuple[Node, ...]
    projected: bool


def weighted_sums(graph: Graph, region: Region) -> tuple[WeightedSum, ...]:
    """The sums of a region that add a branch with parameters to a shortcut of the same shape, in execution order.

    A sum inside another's branch (that of a response norm) is part of that branch, unless its shortcut has parameters.
    """
    active, inside = activations(graph), set(region.nodes)
    found: list[WeightedSum] = []
    for node in region.nodes:
        operands = [a for a in node.args if isinstance(a, Node) and a in active]
        if node.target not in ADDITIONS or len(operands) != 2 or any(shape_of(o) != shape_of(node) for o in operands):
            continue
        reach = [ancestors([operand], inside.__contains__) for operand in operands]
        own = [tuple(n for n in region.nodes if n in reach[i] and n not in reach[1 - i]) for i in (0, 1)]
        weighted = [bool(parameters_of(graph, nodes)) for nodes in own]
        if any(weighted):
            branch = weighted.index(True)
            found.append(WeightedSum(node, operands[1 - branch], operands[branch], own[branch], all(weighted)))
    in_branches = {n for s in found if not s.projected for n in s.nodes}
    return tuple(s for s in found if s.projected or s.sum not in in_branches)


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Shape of a node's value; None where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


# -- attention --------------------------------------------------------------------------------------------------------------
def attention_path(graph: Graph, region: Region) -> str | None:
    """Path of the module inside a region that computes attention, or None where there is none.

    Attention is a product with a softmax, a call of scaled dot-product attention, torch's own layer, or a child whose class is named
    so (talking heads, for one). Where the region's own forward computes it, without a module for it, the answer is the region's path.
    """
    if len(region.paths) != 1:
        return None
    path = region.paths[0]
    for child, kind in graph.types.items():
        if owner(child) == path and re.search("Attention|Attn", kind) and "Pool" not in kind:
            return child
    for node in region.nodes:
        if _is_attention(graph, node):
            origin = node.meta["origin"].path
            inside = origin != path and is_below(origin, [path])
            return f"{path}.{origin[len(path) + 1 :].split('.')[0]}" if inside else path
    return None


def _is_attention(graph: Graph, node: Node) -> bool:
    module = leaf(graph, node)
    if isinstance(module, nn.MultiheadAttention) or re.search("Attention|Attn", type(module).__name__):
        return True
    if isinstance(module, nn.Softmax):
        return _feeds_product(node)
    function = node.target if module is None else module.function if isinstance(module, ByMode) else None
    return node.op != "get_attr" and ("attention" in _name(function) or (_name(function) == "softmax" and _feeds_product(node)))


def _feeds_product(node: Node) -> bool:
    """Whether a softmax is multiplied with something, perhaps after a dropout or a cast."""
    return any(_name(user.target) in _PRODUCTS for near in _users_within(node, 3) for user in near.users)


def _users_within(node: Node, steps: int) -> Iterator[Node]:
    yield node
    if steps:
        for user in node.users:
            yield from _users_within(user, steps - 1)


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "")
