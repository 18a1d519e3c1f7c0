"""What a block is made of, as far as sharing is concerned: norms, attention, MLP, and everything.

Parts are found by structure (what the graph computes), with the libraries' names for MLPs (`mlp`, `ffn`) as a second hint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx, nn

from graphopt.ir.graph import Graph
from graphopt.ir.regions import Region
from graphopt.runtime.by_mode import ByMode

_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_?forward)(_|\d|\.|$)")
_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm", "__matmul__")


class Unfit(Exception):
    """Why a block cannot be shared, or has no surrogate: it becomes a note, never an error."""


def owner_of(name: str) -> str:
    """Path of the module that a parameter is registered in."""
    return name.rpartition(".")[0]


def is_norm(graph: Graph, name: str) -> bool:
    """Whether a parameter belongs to a norm, by its owner's class (`BatchNorm2d`, `LayerNorm`, `GlobalResponseNorm`, ...)."""
    kind = graph.types.get(owner_of(name), "").lower()
    return "norm" in kind or kind.endswith("abn")


def attention_path(graph: Graph, block: Region) -> str | None:
    """Path of the module inside a block that attends, or None where there is none.

    It attends if it multiplies by a softmax, calls scaled dot-product attention, is torch's own layer, or is a child that its class
    calls attention (talking heads, for one). A block that attends in its own forward, with no module for it, has no part that could
    be told apart: the answer is then the block's path.
    """
    if len(block.paths) != 1:
        return None
    for path, kind in graph.types.items():
        if owner_of(path) == block.paths[0] and re.search("Attention|Attn", kind) and "Pool" not in kind:
            return path
    for node in block.nodes:
        if _attends(graph, node):
            path = node.meta["origin"].path
            if not path.startswith(f"{block.paths[0]}."):
                return block.paths[0]
            inside = path[len(block.paths[0]) + 1 :]
            return f"{block.paths[0]}.{inside.split('.')[0]}"
    return None


def part_of(graph: Graph, block: Region, part: str) -> tuple[str, ...]:
    """Names of a block's parameters that belong to `"attention"`, `"mlp"` or `"all"`, norms among them; empty where it has no such part."""
    if part == "all":
        return block.parameters
    attention = attention_path(graph, block)
    if part == "attention":
        return () if attention is None else tuple(n for n in block.parameters if n.startswith(f"{attention}."))
    return tuple(n for n in block.parameters if not (attention and n.startswith(f"{attention}.")) and _in_mlp(graph, block, n))


def leaves_of(graph: Graph, names: Collection[str]) -> tuple[str, ...]:
    """Paths of the leaf modules that own some of these parameters."""
    called = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module")
    return tuple(path for path in called if any(name.startswith(f"{path}.") for name in names))


def demand_mixable(graph: Graph, names: Collection[str]) -> None:
    """Leaves that own these parameters can be handed others.

    Raises:
        Unfit: one cannot, with the reason.
    """
    for path in leaves_of(graph, names):
        leaf = graph.module.get_submodule(path)
        if any(f"{path}.{n}" not in names for n, _ in leaf.named_parameters()):
            raise Unfit(f"{path} ({type(leaf).__name__}) is one leaf, and only some of its parameters would be replaced")
        if next(leaf.buffers(), None) is not None and not is_batch_norm(leaf):
            raise Unfit(f"{path} ({type(leaf).__name__}) is one leaf with buffers: it cannot be handed its weights")


def is_batch_norm(leaf: nn.Module) -> bool:
    """Whether a leaf is one of torch's own batch norms, exactly."""
    return type(leaf) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _in_mlp(graph: Graph, block: Region, name: str) -> bool:
    inside = next((name[len(p) + 1 :] for p in block.paths if name.startswith(f"{p}.")), name)
    # Linear layers of a block that are no attention's are its MLP's, under whatever name.
    return _MLP_NAME.search(inside) is not None or graph.types.get(owner_of(name), "").endswith("Linear")


def _attends(graph: Graph, node: fx.Node) -> bool:
    function: Any = node.target
    if node.op == "call_module":
        module = graph.module.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention) or re.search("Attention|Attn", type(module).__name__):
            return True
        if isinstance(module, nn.Softmax):
            return _feeds_product(graph, node)
        function = module.function if isinstance(module, ByMode) else None
    elif node.op not in ("call_function", "call_method"):
        return False
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    return "attention" in name or (name == "softmax" and _feeds_product(graph, node))


def _feeds_product(graph: Graph, node: fx.Node) -> bool:
    """Whether a softmax is multiplied with something, a dropout or a cast between."""
    return any(_name(user) in _PRODUCTS for near in _within(node, 3) for user in near.users)


def _within(node: fx.Node, steps: int) -> Iterator[fx.Node]:
    yield node
    if steps:
        for user in node.users:
            yield from _within(user, steps - 1)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
