"""Which parameters of a block are its attention's, its MLP's and its norms', and which leaves can take mixed weights.

Parts are found by structure (what the graph computes), with the libraries' names for MLPs (`mlp`, `ffn`) as a second hint.
"""

import re
from collections.abc import Collection
from typing import Literal

from torch import nn

from graphopt.ir.graph import Graph
from graphopt.ir.paths import is_below, owner
from graphopt.ir.patterns import attention_path
from graphopt.ir.regions import Region

Part = Literal["attention", "mlp", "all"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_?forward)(_|\d|\.|$)")


class NotShareable(Exception):
    """Why a block cannot be shared, or has no surrogate. Selection turns it into a diagnostic."""


def is_norm(graph: Graph, name: str) -> bool:
    """Whether a parameter belongs to a norm, by its owner's class (`BatchNorm2d`, `LayerNorm`, `GlobalResponseNorm`, ...)."""
    kind = graph.types.get(owner(name), "").lower()
    return "norm" in kind or kind.endswith("abn")


def part_of(graph: Graph, block: Region, part: Part) -> tuple[str, ...]:
    """Names of a block's parameters that belong to a part, norms among them; empty where it has no such part."""
    if part == "all":
        return block.parameters
    attention = attention_path(graph, block)
    attending = [n for n in block.parameters if attention is not None and is_below(n, [attention])]
    if part == "attention":
        return tuple(attending)
    return tuple(n for n in block.parameters if n not in attending and _in_mlp(graph, block, n))


def _in_mlp(graph: Graph, block: Region, name: str) -> bool:
    inside = next((name[len(p) + 1 :] for p in block.paths if name.startswith(f"{p}.")), name)
    # A block's linear layers outside its attention are its MLP's, under whatever name.
    return _MLP_NAME.search(inside) is not None or graph.types.get(owner(name), "").endswith("Linear")


def leaves_of(graph: Graph, names: Collection[str]) -> tuple[str, ...]:
    """Paths of the leaf modules that own some of these parameters."""
    called = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module")
    return tuple(path for path in called if any(name.startswith(f"{path}.") for name in names))


def check_mixable(graph: Graph, names: Collection[str]) -> None:
    """Checks that the leaves that own these parameters can compute with mixed ones.

    Raises:
        NotShareable: one cannot, with the reason.
    """
    for path in leaves_of(graph, names):
        leaf = graph.module.get_submodule(path)
        if any(f"{path}.{n}" not in names for n, _ in leaf.named_parameters()):
            raise NotShareable(f"{path} ({type(leaf).__name__}) is one leaf, and only some of its parameters would be mixed")
        if next(leaf.buffers(), None) is not None and type(leaf) not in _BATCH_NORMS:
            raise NotShareable(f"{path} ({type(leaf).__name__}) is one leaf with buffers, so its weights cannot be mixed")
