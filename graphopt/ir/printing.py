"""A graph as text: one line per node, for `graph.txt`, golden tests and errors. Deterministic."""

from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import Graph
from graphopt.ir.shapes import SHAPE_BATCH


def graph_text(graph: Graph) -> str:
    """Every node with what it calls, its inputs, its output's shape (`N` the batch), where it comes from and which pass put it there.

    `layer1_0_conv1  Conv2d layer1.0.conv1(relu) -> (N, 16, 32, 32)  # layer1.0.conv1`
    """
    rows = [(node.name, _call(graph, node), _shape(node.meta.get("val")), _remarks(graph, node)) for node in graph.nodes]
    width = max((len(row[0]) for row in rows), default=0)
    lines = []
    for name, call, shape, remarks in rows:
        lines.append(f"{name:<{width}}  {call}" + (f" -> {shape}" if shape else "") + (f"  # {remarks}" if remarks else ""))
    for section in graph.sections:
        names = [node.name for node in sorted(section.nodes)]
        kind = getattr(section.wrap, "__name__", type(section.wrap).__name__)
        lines.append(f"section {section.name} ({kind}, {section.author}): {names[0]} .. {names[-1]} ({len(names)} nodes)")
    return "\n".join(lines) + "\n"


def _call(graph: Graph, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    inside = ", ".join([*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())])
    if node.op == "call_module":
        return f"{type(graph.module.get_submodule(str(node.target))).__name__} {node.target}({inside})"
    if node.op == "get_attr":
        return f"get {node.target}"
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.target)}({inside})"
    if node.op == "call_method":
        return f".{node.target}({inside})"
    return f"output({inside})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inside = ", ".join(_argument(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"{_argument(value.start)}:{_argument(value.stop)}:{_argument(value.step)}"
    return repr(value)


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ["N" if i == 0 and size == SHAPE_BATCH else str(size) for i, size in enumerate(value.shape)]
        return f"({', '.join(sizes)})"
    if isinstance(value, list | tuple):
        inside = [_shape(item) for item in value]
        return f"[{', '.join(inside)}]" if any(inside) else ""
    return ""


def _remarks(graph: Graph, node: fx.Node) -> str:
    origin = node.meta.get("origin")
    remarks = []
    if origin is not None and origin.path:
        remarks.append(origin.path if not origin.call else f"{origin.path} call {origin.call}")
    if "pass" in node.meta:
        remarks.append(f"pass {node.meta['pass'] + 1}")
    if node.op == "call_module":
        parameters = list(graph.module.get_submodule(str(node.target)).parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            remarks.append("frozen")
    return ", ".join(remarks)
