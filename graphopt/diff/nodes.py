"""Nodes as the diff shows them."""

import torch
from torch.fx import Node

from graphopt.diff.model import NodeRow, Shape
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, leaf, parameters_read
from graphopt.ir.shapes import SHAPE_BATCH


def describe(graph: Graph, node: Node, statuses: tuple[str, ...]) -> NodeRow:
    """A node of a graph for the diff."""
    origin = node.meta["origin"]
    return NodeRow(
        name=node.name,
        op=node.op,
        what=_what(graph, node),
        path=str(node.target) if node.op in ("call_module", "get_attr") else origin.path,
        call=origin.call,
        shape=shape(node, batched=node in activations(graph)),
        inputs=tuple(n.name for n in node.all_input_nodes),
        statuses=statuses,
        changed_by=node.meta.get("pass"),
        parameters=sum(p.numel() for _, p in parameters_read(graph.module, node)),
    )


def _what(graph: Graph, node: Node) -> str:
    if node.op == "call_module":
        return type(leaf(graph, node)).__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target).rpartition(".")[2]


def shape(node: Node, *, batched: bool = True) -> Shape | None:
    """Shape of a node's output with the batch as "N" (windows of Swin: "64N"); None where it is no tensor.

    Args:
        batched: whether the first size is the batch's; not so for weights and what is computed from them.
    """
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
        value = value[0]
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return None
    sizes: list[str | int] = [int(s) for s in value.shape]
    batch = int(value.shape[0])
    if batched and value.ndim > 1 and batch % SHAPE_BATCH == 0:
        sizes[0] = "N" if batch == SHAPE_BATCH else f"{batch // SHAPE_BATCH}N"
    return tuple(sizes)
