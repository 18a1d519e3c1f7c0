"""One graph for both modes: what `self.training` decided while tracing becomes a module that decides while running.

A backbone is traced in train mode and in eval mode. Nodes of the two graphs that differ only in constants (`F.dropout(training=True)`,
`dropout_p=0.1`) become a `ByMode` module. If the structure differs, the smallest module that contains the difference has to stay opaque.
There is one exception: where the eval graph is a part of the train graph (the auxiliary heads of GoogLeNet), only the output depends on
the mode.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.ir.nodes import call_writes_in_place
from graphopt.runtime.by_mode import ByMode, OutputByMode, Slot


class Difference(Exception):
    """The two graphs differ in structure inside the module of that path."""


def merge_modes(train: fx.Graph, eval: fx.Graph, scope_of: Callable[[Node], str]) -> dict[str, ByMode | OutputByMode]:
    """Rewrites `train` in place so that it serves eval mode too; returns the modules that it now calls, by target.

    Args:
        train, eval: the graphs of one backbone in each mode.
        scope_of: path of the module whose forward made a node (for the call of a leaf: path of its parent).

    Raises:
        Difference: with the path of the smallest module whose structure depends on the mode.
    """
    train_node_of = _matched(train, eval, scope_of)
    new: dict[str, ByMode | OutputByMode] = {}
    for number, (eval_node, node) in enumerate(train_node_of.items()):
        in_train = (node.args, node.kwargs)
        in_eval = fx.node.map_arg((eval_node.args, eval_node.kwargs), train_node_of.__getitem__)
        if _equal(in_train, in_eval):
            continue
        if node.op == "output":
            new["output_by_mode"], eval_value = OutputByMode(), in_eval[0][0]
            with train.inserting_before(node):
                switch = train.call_module("output_by_mode", (node.args[0], eval_value))
            switch.meta = dict(eval_value.meta) if isinstance(eval_value, Node) else {}
            node.args = (switch,)
        elif node.op in ("call_function", "call_method"):
            target, inputs = f"by_mode.{number}", list[Node]()
            new[target] = ByMode(node.target, _template(in_train, inputs), _template(in_eval, inputs))
            node.op, node.target, node.args, node.kwargs = "call_module", target, tuple(inputs), {}
        else:
            raise Difference(scope_of(node))
    return new


def _matched(train: fx.Graph, eval: fx.Graph, scope_of: Callable[[Node], str]) -> dict[Node, Node]:
    """Eval node -> train node, in execution order. Train nodes that compute only what eval mode does not need are skipped.

    Raises Difference if eval mode needs a node that train mode lacks, or if one that would be skipped moves a buffer.
    """
    matched: dict[Node, Node] = {}
    train_nodes = list(train.nodes)
    position = 0
    for node in eval.nodes:
        # What is left of the train graph before its output (auxiliary heads) feeds nothing that eval mode computes.
        found = len(train_nodes) - 1 if node.op == "output" else position
        while found < len(train_nodes) and not _is_same_call(train_nodes[found], node, matched):
            found += 1
        if found == len(train_nodes):
            raise Difference(scope_of(train_nodes[position]))
        if (moving := next(filter(_moves_state, train_nodes[position:found]), None)) is not None:
            raise Difference(scope_of(moving))  # one graph would move it in eval mode, too
        matched[node] = train_nodes[found]
        position = found + 1
    return matched


#: methods and functions whose value is memory of their first input
_VIEWS = {operator.getitem, getattr, "detach", "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "expand"}


def _moves_state(node: Node) -> bool:
    """Whether a node writes into a buffer or a parameter, or into a view of one."""
    if not _writes(node):
        return False
    source = node.args[0]
    while isinstance(source, Node) and source.op != "get_attr" and (source.target in _VIEWS or _writes(source)):
        source = source.args[0]
    return isinstance(source, Node) and source.op == "get_attr"


def _writes(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and bool(node.args) and call_writes_in_place(node.target, node.args, node.kwargs)


def _is_same_call(train_node: Node, eval_node: Node, matched: dict[Node, Node]) -> bool:
    """Whether two nodes are the same operation on the same values; their constants may differ."""
    if (train_node.op, train_node.target) != (eval_node.op, eval_node.target):
        return False
    return train_node.op == "output" or train_node.all_input_nodes == [matched.get(i) for i in eval_node.all_input_nodes]


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested arguments are equal in structure, types and values (NaN equals NaN)."""

    def same(a: Any, b: Any) -> bool:
        # The values of tensors are not compared: two of them count as different constants.
        return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b or (a != a and b != b)))

    (leaves_a, structure_a), (leaves_b, structure_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return structure_a == structure_b and all(map(same, leaves_a, leaves_b))


def _template(arguments: Any, inputs: list[Node]) -> Any:
    """`arguments` with a `Slot` for each node; nodes that `inputs` lacks are added to it."""

    def slot(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if value not in inputs:
            inputs.append(value)
        return Slot(inputs.index(value))

    return fx.node.map_aggregate(arguments, slot)
