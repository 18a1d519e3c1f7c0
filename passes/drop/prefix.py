"""Taking a prefix out of training: no gradients, eval semantics, and nothing but its output read by what comes after."""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from graphopt import Editor, Graph, PassError
from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.nodes import activations, parameters_of, parameters_read
from graphopt.ir.paths import is_below
from graphopt.ir.shapes import SHAPE_BATCH, propagate_shapes
from graphopt.passes.drop.cut import prefix_of
from graphopt.runtime.body import NoGrad
from graphopt.runtime.by_mode import always_eval, depends_on_mode, is_random


def drop_prefix(edit: Editor, cuts: Sequence[Node]) -> dict[str, int]:
    """Takes everything up to the last of `cuts` out of training.

    The graph can afterwards be divided at each of the cuts, so that the features of a later one can be computed from those of an earlier.
    Returns figures for the report.

    Raises:
        PassError: a parameter is read before and after the cut, the prefix draws random numbers in eval mode too, or a section of another
            pass with a loss of its own lies in it.
    """
    graph, last = edit.graph, cuts[-1]
    nodes = prefix_of(graph, last)
    _check_separable(graph, nodes)
    names = parameters_of(graph, nodes)
    edit.freeze(names)
    converted = _stay_in_eval_mode(edit, nodes)
    edit.keep_buffers((*nodes, *_read_for_nothing(graph, nodes)))
    for cut in cuts:
        _recompute_scalars(edit, cut)
    active = activations(graph)
    edit.outline(prefix_of(graph, last), NoGrad, "dropped_prefix", only=lambda piece: not active.isdisjoint(piece))
    parameters = sum(graph.module.get_parameter(n).numel() for n in names)
    return {"prefix_nodes": len(nodes), "prefix_parameters": parameters, "always_eval": converted}


def _check_separable(graph: Graph, prefix: Sequence[Node]) -> None:
    inside = set(prefix)
    later = {id(p): name for n in graph.nodes if n not in inside for name, p in parameters_read(graph.module, n)}
    for name in parameters_of(graph, prefix):
        if (other := later.get(id(graph.module.get_parameter(name)))) is not None:
            raise PassError(
                f"{name} is read before the cut and after it (as {other}), so it cannot be dropped",
                where=name,
                fix="End the prefix where no parameter is shared across its end",
            )
    for node in prefix:
        if node.op == "call_function" and is_random(node.target):
            raise PassError("the prefix draws random numbers, so its features cannot be cached", where=f"node {node}")
    for section in graph.sections:
        if section.target and not inside.isdisjoint(section.nodes):
            raise PassError(
                f"{section.author.name} trains a part of the prefix with a local loss, so it cannot be dropped",
                where=str(section.author),
                fix="End the prefix earlier, or leave one of the two passes out",
            )


def _read_for_nothing(graph: Graph, prefix: Sequence[Node]) -> list[Node]:
    """What modules that lie wholly in a prefix read, and the output does not depend on: buffers that they only write."""
    inside, used = set(prefix), ancestors([graph.output])

    def is_inside(path: str) -> bool:
        nodes = [n for n in used if "origin" in n.meta and is_below(n.meta["origin"].path, (path,))]
        return bool(nodes) and inside.issuperset(nodes)

    return [n for n in graph.nodes if n.op == "get_attr" and n not in used and is_inside(n.meta["origin"].path)]


def _stay_in_eval_mode(edit: Editor, prefix: Sequence[Node]) -> int:
    """Replaces leaves that depend on the mode; those that are also called after the cut get a copy. Returns how many leaves."""
    inside, count = set(prefix), 0
    for target in dict.fromkeys(str(n.target) for n in prefix if n.op == "call_module"):
        module = edit.graph.module.get_submodule(target)
        if not depends_on_mode(module):
            continue
        calls = [n for n in edit.calls(target) if n in inside]
        if len(calls) == len(edit.calls(target)):
            edit.replace_leaf(calls[0], always_eval(module))
        else:
            # It has no parameters, or one would be read before and after the cut: without buffers too, no state-dict key changes.
            if next(module.buffers(), None) is not None:
                why = f"{target} is called before the cut and after it, and has buffers"
                raise PassError(why, where=target, fix="End the prefix elsewhere")
            path = f"always_eval.{target.replace('.', '_')}"
            edit.add_module(path, always_eval(module))
            for call in calls:
                edit.set_call(call, path)
        count += 1
    return count


def _recompute_scalars(edit: Editor, cut: Node) -> None:
    """Recomputes numbers of shape arithmetic that cross a cut from the cut itself: constants, or multiples of the batch size."""
    graph = edit.graph
    after = descendants([cut]) - {cut}
    from_input = descendants([graph.placeholder])
    read = dict.fromkeys(i for n in graph.nodes if n in after for i in n.all_input_nodes)
    crossing = [n for n in read if n is not cut and n not in after and n in from_input]
    if not crossing:
        return
    batch = edit.call("size", (cut, 0), after=cut)
    larger = _values_at(graph, SHAPE_BATCH + 1)
    for node in crossing:
        small = node.meta["val"]
        if isinstance(small, torch.Tensor):
            raise PassError(f"{node} leads from the prefix past its end", where=f"node {node}")
        edit.redirect(node, _scaled(edit, node, small, larger[node], batch), [u for u in node.users if u in after])


def _scaled(edit: Editor, node: Node, small: Any, large: Any, batch: Node) -> Any:
    """A number, or a nest of numbers, that is `small` at one batch size and `large` at the next, in terms of the batch size."""
    if isinstance(small, tuple | list):
        values = [_scaled(edit, node, a, b, batch) for a, b in zip(small, large, strict=True)]
        return values if isinstance(small, list) else tuple(values)
    if small == large or not isinstance(small, int):
        return small
    factor = small // SHAPE_BATCH
    if (factor * SHAPE_BATCH, factor * (SHAPE_BATCH + 1)) != (small, large):
        raise PassError("a number that depends on the batch crosses the cut, and is not a multiple of the batch size", where=f"node {node}")
    return batch if factor == 1 else edit.call(operator.mul, (batch, factor), after=batch)


def _values_at(graph: Graph, batch: int) -> dict[Node, Any]:
    """The values of all nodes at another batch size."""
    module = fx.GraphModule(graph.module, copy.deepcopy(graph.fx))
    propagate_shapes(module, graph.input, batch)
    return {node: other.meta.get("val") for node, other in zip(graph.nodes, module.graph.nodes, strict=True)}
