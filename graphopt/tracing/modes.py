"""One graph for both modes: what `self.training` decided while tracing becomes a module that decides while running.

A backbone is traced twice, in train and in eval mode. Where the two graphs differ only in constants (`F.dropout(training=True)`,
`dropout_p=0.1`), the node becomes a `ByMode` module. Where their structure differs, the smallest module that holds the difference must
stay opaque; a difference in the backbone's own forward is met when the eval graph is part of the train graph (GoogLeNet's
auxiliary heads): the output then follows the mode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.runtime.by_mode import ByMode, OutputByMode, Slot


class Difference(Exception):
    """The two graphs differ in structure inside module `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def merge_modes(train: fx.Graph, eval: fx.Graph, scope_of: Callable[[fx.Node], str]) -> dict[str, ByMode | OutputByMode]:
    """Rewrites `train` in place so that it serves eval mode too; returns the modules it now calls, by target.

    Args:
        train, eval: the graphs of one backbone in each mode.
        scope_of: path of the module whose forward made a node (for a leaf's call: its parent's).

    Raises:
        Difference: with the path of the smallest module whose structure depends on the mode.
    """
    pair: dict[fx.Node, fx.Node] = {}  # eval node -> train node
    train_nodes = list(train.nodes)
    position = 0
    new: dict[str, ByMode | OutputByMode] = {}
    pending: list[tuple[fx.Node, fx.Node]] = []
    for node in eval.nodes:
        skipped = position
        if node.op == "output":
            # What is left of the train graph feeds nothing that eval mode computes: auxiliary heads, which only the output needs.
            skipped = len(train_nodes) - 1
        while skipped < len(train_nodes) and not _same_call(train_nodes[skipped], node, pair):
            skipped += 1
        if skipped == len(train_nodes):
            raise Difference(scope_of(train_nodes[position]))
        twin = train_nodes[skipped]
        pair[node] = twin
        position = skipped + 1
        pending.append((twin, node))
    for number, (twin, node) in enumerate(pending):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: pair[n])
        if _equal((twin.args, twin.kwargs), (args, kwargs)):
            continue
        if twin.op == "output":
            with train.inserting_before(twin):
                switch = train.call_module("output_by_mode", (twin.args[0], args[0]))
            switch.meta = dict(args[0].meta) if isinstance(args[0], fx.Node) else {}
            twin.args = (switch,)
            new["output_by_mode"] = OutputByMode()
            continue
        if twin.op not in ("call_function", "call_method"):
            raise Difference(scope_of(twin))
        inputs: list[fx.Node] = []
        templates = tuple(_template(t, inputs) for t in ((twin.args, twin.kwargs), (args, kwargs)))
        target = f"by_mode.{number}"
        new[target] = ByMode(twin.target, *templates)  # type: ignore[arg-type]
        twin.op, twin.target, twin.args, twin.kwargs = "call_module", target, tuple(inputs), {}
    return new


def _same_call(a: fx.Node, b: fx.Node, pair: dict[fx.Node, fx.Node]) -> bool:
    """The same operation on the same values, constants aside."""
    if a.op != b.op:
        return False
    if a.op == "output":
        return True
    if a.target != b.target:
        return False
    if a.op == "placeholder":
        return True
    mine, theirs = a.all_input_nodes, b.all_input_nodes
    return len(mine) == len(theirs) and all(pair.get(t) is m for m, t in zip(mine, theirs, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return all(_equal(getattr(a, f), getattr(b, f)) for f in ("start", "stop", "step"))
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return True
    return type(a) is type(b) and (a is b or bool(operator.eq(a, b)))


def _template(arguments: Any, inputs: list[fx.Node]) -> Any:
    def slot(node: fx.Node) -> Slot:
        if node not in inputs:
            inputs.append(node)
        return Slot(inputs.index(node))

    def walk(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return slot(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(walk, value))
        if isinstance(value, (list, tuple)):
            return tuple(map(walk, value)) if isinstance(value, tuple) else [walk(v) for v in value]
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(walk(value.start), walk(value.stop), walk(value.step))
        return value

    return walk(arguments)
