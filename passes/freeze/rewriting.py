"""The edits behind freeze: eval semantics for norms, lean operators, and the prefix as a section without gradients."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from graphopt.passes.freeze import gates
from graphopt.passes.freeze.extent import parameters_read
from graphopt.passes.freeze.lean import FUNCTIONS, METHODS, NORM_FUNCTIONS, frozen_form, original_class
from graphopt.rewriting.sections import NoGrad, Section
from graphopt.trace import Graph
from graphopt.trace.normalise import ByMode, Slot

PREFIX = "frozen_prefix"


# -- norms --------------------------------------------------------------------------------------------------------------------------
def freeze_norms(graph: Graph, nodes: Iterable[fx.Node], lean: set[fx.Node], *, by: str) -> int:
    """Gives every norm among `nodes` that has running statistics eval semantics. Returns how many.

    Args:
        lean: nodes where a norm that is a function call becomes its lean form at once (modules: see `make_lean`).
    """
    count = 0
    for node in nodes:
        if node.op == "call_module":
            module = graph.module.get_submodule(str(node.target))
            if isinstance(module, ByMode) and module.function in NORM_FUNCTIONS:
                count += _freeze_switched_norm(graph, node, module, node in lean, by)
                continue
            form = frozen_form(module, lean=False)
            if form is not None:
                graph.replace_module(str(node.target), form)
                node.meta["by"] = by
                count += sum(1 for m in form.modules() if getattr(m, "running_mean", None) is not None)
        elif node.op == "call_function" and node.target in NORM_FUNCTIONS:
            count += _freeze_norm_call(node, node in lean, by)
    return count


def _freeze_norm_call(node: fx.Node, lean: bool, by: str) -> bool:
    flag, lean_form = NORM_FUNCTIONS[node.target]
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    if bound.arguments.get("running_mean") is None:
        return False
    bound.arguments[flag] = False
    node.args, node.kwargs = tuple(bound.args), dict(bound.kwargs)
    if lean:
        node.target = lean_form
    node.meta["by"] = by
    return True


def _freeze_switched_norm(graph: Graph, node: fx.Node, module: ByMode, lean: bool, by: str) -> bool:
    """A norm function that was traced with `training=self.training`: the call of eval mode serves both modes."""
    inputs = node.args
    args, kwargs = fx.node.map_aggregate(module.eval_arguments, lambda a: inputs[a] if isinstance(a, Slot) else a)  # type: ignore[misc]
    node.op, node.target, node.args, node.kwargs = "call_function", module.function, tuple(args), dict(kwargs)  # type: ignore[assignment]
    return _freeze_norm_call(node, lean, by)


# -- lean operators -------------------------------------------------------------------------------------------------------------------
def make_lean(graph: Graph, nodes: Sequence[fx.Node], *, by: str) -> dict[str, int]:
    """Puts lean operators in place of stock ones at `nodes`, all frozen. Returns how many nodes of each kind changed."""
    done: Counter[str] = Counter()
    members, seen = set(nodes), set[fx.Node]()
    order = {n: i for i, n in enumerate(graph.nodes)}
    memory = {n: _memory(n) for n in order}
    for node in nodes:
        if node in seen:
            continue
        # A leaf may be called more than once (ResNet's `relu`): its calls change together or not at all.
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == node.target] if node.op == "call_module" else [node]
        seen.update(calls)
        if any(c not in members for c in calls) or (_is_relu(graph, node) and all(_kept_by_a_user(graph, c) for c in calls)):
            continue
        if _in_place(graph, node):
            if not all(_can_leave_its_input(c, order, memory) for c in calls):
                continue
            for call in calls:
                _read_instead_of_input(call, order)
        kind = _replace(graph, node)
        if kind:
            done[kind] += len(calls)
            for call in calls:
                call.meta["by"] = by
    return dict(sorted(done.items()))


def _replace(graph: Graph, node: fx.Node) -> str | None:
    """The lean form of one operator, for all its calls; its kind, or None where the stock one is as lean."""
    if node.op == "call_module":
        target = str(node.target)
        stock = graph.module.get_submodule(target)
        form = frozen_form(stock, lean=True)
        if form is None:
            return None
        graph.replace_module(target, form)
        return original_class(stock).__name__
    lean: Callable[..., Any] | None = None
    if node.op == "call_function":
        lean = FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        lean = METHODS.get(str(node.target))
    if lean is None:
        return None
    node.op, node.target = "call_function", lean
    return lean.__name__


def _is_relu(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.module.get_submodule(str(node.target)), nn.ReLU)
    return (FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))) is gates.relu


def _kept_by_a_user(graph: Graph, node: fx.Node) -> bool:
    """Whether a layer that trains saves this output anyway: a stock ReLU then saves the same tensor, and a mask would come on top."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    called = [u for u in node.users if u.op == "call_module" and isinstance(graph.module.get_submodule(str(u.target)), layers)]
    return any(p.requires_grad for u in called for p in parameters_read(graph, u))


# -- in-place activations -----------------------------------------------------------------------------------------------------------
def _in_place(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return False
    if getattr(node.target, "__name__", "").endswith("_"):
        return True
    return bool(node.kwargs.get("inplace") or (node.target in _INPLACE_AT and True in node.args[_INPLACE_AT[node.target] :]))


#: position of `inplace` among the arguments
_INPLACE_AT = {F.relu: 1, F.relu6: 1, F.hardsigmoid: 1, F.leaky_relu: 2, F.hardtanh: 3}


def _can_leave_its_input(node: fx.Node, order: dict[fx.Node, int], memory: dict[fx.Node, set[StorageWeakRef]]) -> bool:
    """Whether nobody would see that a node no longer changes its input, once later readers of the input read the node instead."""
    source, here = node.all_input_nodes[0], order[node]
    for other, held in memory.items():
        if other is node or order[other] > here or memory[source].isdisjoint(held):
            continue
        if other.op in ("placeholder", "get_attr"):
            return False
        if other is not source and any(order[u] > here for u in other.users):
            return False
    return True


def _read_instead_of_input(node: fx.Node, order: dict[fx.Node, int]) -> None:
    source = node.all_input_nodes[0]
    for user in list(source.users):
        if order[user] > order[node]:
            user.replace_input_with(source, node)


def _memory(node: fx.Node) -> set[StorageWeakRef]:
    """Storages of a node's fake tensors: two nodes whose sets meet share memory."""
    return {StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)}


# -- the prefix -----------------------------------------------------------------------------------------------------------------------
def cut_prefix(graph: Graph, prefix: Sequence[fx.Node], *, by: str) -> None:
    """Runs the frozen prefix without gradients: one section, or several where other passes' sections divide it."""
    graph.sections[:] = [s for s in graph.sections if not (s.by == by and s.name.startswith(PREFIX))]
    for piece in _pieces(graph, prefix):
        graph.add_section(Section(PREFIX, piece, NoGrad, by))


def _pieces(graph: Graph, prefix: Sequence[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """The prefix by the sections that hold its nodes; what no section holds, by the sections it depends on.

    Each piece is such that no path leaves and enters it again, because the prefix holds everything before its nodes.
    """
    holders = {n: frozenset(i for i, s in enumerate(graph.sections) if n in s.nodes) for n in prefix}
    before: dict[fx.Node, frozenset[int]] = {}
    for node in prefix:
        sources = [i for i in node.all_input_nodes if i in before]
        before[node] = frozenset().union(*(before[i] | holders[i] for i in sources))
    pieces: dict[tuple[frozenset[int], frozenset[int]], list[fx.Node]] = {}
    for node in prefix:
        key = (holders[node], before[node] if not holders[node] else frozenset())
        pieces.setdefault(key, []).append(node)
    return [tuple(p) for p in pieces.values() if any(True for n in p for s in (n, *n.all_input_nodes) for _ in parameters_read(graph, s))]
