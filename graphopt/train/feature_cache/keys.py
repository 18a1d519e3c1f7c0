"""Keys of cached features: names that change with everything that the features depend on."""

from collections.abc import Iterable, Sequence

from torch import Tensor, fx
from torch.fx import Node

from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute
from graphopt.train.hashing import hash_parts, raw_bytes


def computing(start: Node | None, stop: Node) -> set[Node]:
    """The nodes that compute `stop` from `start` (from the input, for None); `stop` is one of them, `start` is not."""
    return ancestors([stop], lambda node: node is not start and node.op != "placeholder")


def tensors_read(module: fx.GraphModule, nodes: Iterable[Node]) -> dict[str, Tensor]:
    """Every parameter and buffer that nodes of a flat graph read, by name."""
    found: dict[str, Tensor] = {}
    for node in nodes:
        path = str(node.target)
        if node.op == "call_module":
            leaf = module.get_submodule(path)
            found |= {f"{path}.{n}": t for n, t in (*leaf.named_parameters(), *leaf.named_buffers())}
        elif node.op == "get_attr" and isinstance(value := attribute(module, path), Tensor):
            found[path] = value
    return found


def key_of(graph: Graph, start: Node | None, stop: Node, parent: str, options: Sequence[object]) -> str:
    """The key of the features at `stop`, computed from those at `start`, or from images, that have the key `parent`."""
    inside = computing(start, stop)
    ordered = [n for n in graph.nodes if n in inside]
    text = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in ordered]
    # A leaf's output depends on its class and its settings, too, which its text form has.
    text += [str(graph.module.get_submodule(str(n.target))) for n in ordered if n.op == "call_module"]
    tensors = tensors_read(graph.module, ordered)
    values = (bytes(raw_bytes(tensors[name].cpu())) for name in sorted(tensors))
    return hash_parts("\n".join([parent, *map(str, options), *text]).encode(), *values)
