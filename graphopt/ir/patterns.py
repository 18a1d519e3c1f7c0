"""Structures that passes look for in a region: residual sums, sums of a shortcut and a branch with parameters, and attention."""

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, leaf, overwriter, parameters_of
from graphopt.ir.paths import is_below, owner
from graphopt.ir.regions import Region
from graphopt.runtime.by_mode import ByMode

#: functions and methods that add two tensors
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
#: methods that give another view of a tensor with its elements in the same order
VIEWS = frozenset({"reshape", "view", "flatten", "contiguous"})
_ACTIVATIONS: frozenset[Any] = frozenset({F.relu, torch.relu, F.relu_, torch.relu_, F.gelu, F.silu, "relu", "relu_"})
_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "__matmul__")


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Shape of a node's value; None where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


class NotResidualError(Exception):
    """A block is not made of residual sums; the text says why, for a diagnostic about the block."""


@dataclass(frozen=True)
class Residual:
    """A sum of a shortcut and a branch.

    Attributes:
        sum: the node that adds. shortcut, branch: its operands. nodes: what computes the branch alone, in execution order.
        projected: whether the shortcut has parameters too; then which operand counts as the branch means nothing.
    """

    sum: Node
    shortcut: Node
    branch: Node
    nodes: tuple[Node, ...]
    projected: bool = False


def residuals(graph: Graph, block: Region) -> tuple[Residual, ...]:
    """The residual sums of a block with identity shortcuts, in execution order: ResNet's blocks have one, transformer blocks two.

    Between the sums and after the last there is nothing but elementwise activations and views, so that a block without its branches
    passes its input on. Raises NotResidualError for any other block, and where branches cannot be separated from the rest.
    """
    if not block.closed:
        raise NotResidualError("it is not closed: more than one tensor goes in or comes out")
    current, end = block.entries[0], block.exits[0]
    if shape_of(current) != shape_of(end):
        raise NotResidualError(f"it is not shape-preserving: {_sample(current)} goes in, {_sample(end)} comes out")
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
        if node.op == "call_module" or node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
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
    # What nothing reads (the rest of an unpacked shape, an assertion on it) is part of the branch.
    alive = graph.cached(_read_in_the_end)
    nodes = descendants(nodes, follow=lambda n: n not in alive)
    if any(u not in nodes and u is not node for n in nodes for u in n.users):
        raise NotResidualError(f"its branch is used elsewhere than in {node}")
    if shape_of(branch) != shape_of(shortcut):
        raise NotResidualError("its branch has another shape than its shortcut")
    if overwriter(graph, shortcut) in nodes:
        raise NotResidualError("its branch changes its shortcut in place")
    return Residual(node, shortcut, branch, tuple(sorted(nodes, key=graph.order.__getitem__)))


def _read_in_the_end(graph: Graph) -> set[Node]:
    return ancestors([graph.output])


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


def _sample(node: Node) -> tuple[int, ...]:
    return (shape_of(node) or ())[1:]


def weighted_sums(graph: Graph, region: Region) -> tuple[Residual, ...]:
    """The sums of a region that add a branch with parameters to a shortcut of the same shape, in execution order.

    A sum inside another's branch (that of a response norm) is part of that branch, unless its shortcut has parameters.
    """
    active, inside = activations(graph), set(region.nodes)
    found: list[Residual] = []
    for node in region.nodes:
        operands = [a for a in node.args if isinstance(a, Node) and a in active]
        if node.target not in ADDITIONS or len(operands) != 2 or any(shape_of(o) != shape_of(node) for o in operands):
            continue
        reach = [ancestors([operand], inside.__contains__) for operand in operands]
        own = [tuple(n for n in region.nodes if n in reach[i] and n not in reach[1 - i]) for i in (0, 1)]
        weighted = [bool(parameters_of(graph, nodes)) for nodes in own]
        if any(weighted):
            branch = weighted.index(True)
            found.append(Residual(node, operands[1 - branch], operands[branch], own[branch], all(weighted)))
    in_branches = {n for s in found if not s.projected for n in s.nodes}
    return tuple(s for s in found if s.projected or s.sum not in in_branches)


def attention_path(graph: Graph, region: Region) -> str | None:
    """Path of the module inside a region that computes attention, or None where there is none.

    Attention is a product with a softmax, a call of scaled dot-product attention, torch's own layer, or a child whose class is named
    so (talking heads, for one). Where the region's own forward computes it, without a module for it, the answer is the region's path.
    """
    if len(region.paths) != 1:
        return None
    path = region.paths[0]
    if path in (named := graph.cached(_named_attention)):
        return named[path]
    for node in region.nodes:
        if _is_attention(graph, node):
            origin = node.meta["origin"].path
            inside = origin != path and is_below(origin, [path])
            return f"{path}.{origin[len(path) + 1 :].split('.')[0]}" if inside else path
    return None


def _named_attention(graph: Graph) -> dict[str, str]:
    """Of each module, its first child whose class is named after attention."""
    found: dict[str, str] = {}
    for child, kind in graph.types.items():
        if re.search("Attention|Attn", kind) and "Pool" not in kind:
            found.setdefault(owner(child), child)
    return found


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
    near = {node}
    for _ in range(4):
        near = {user for each in near for user in each.users}
        if any(_name(user.target) in _PRODUCTS for user in near):
            return True
    return False


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "")
