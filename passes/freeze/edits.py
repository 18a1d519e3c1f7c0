"""The edits behind freeze: eval semantics for norms, lean operators, and the prefix as a section without gradients."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from graphopt import Editor, Graph
from graphopt.ir.nodes import leaf, parameters_read, storages, trainable, writes_in_place
from graphopt.passes.freeze import activations
from graphopt.passes.freeze.lean import FUNCTIONS, METHODS, NORM_FUNCTIONS, frozen_form, original_class
from graphopt.runtime.body import NoGrad
from graphopt.runtime.by_mode import ByMode, Slot

PREFIX = "frozen_prefix"


# -- norms ------------------------------------------------------------------------------------------------------------------
def freeze_norms(edit: Editor, nodes: Iterable[Node], lean: set[Node]) -> int:
    """Gives every norm among `nodes` that has running statistics eval semantics. Returns how many.

    Args:
        lean: nodes where a norm that is a function call becomes its lean form at once (modules: see `use_lean_operators`).
    """
    count = 0
    for node in nodes:
        module = leaf(edit.graph, node)
        if isinstance(module, ByMode) and module.function in NORM_FUNCTIONS:
            count += _freeze_switched_norm(edit, node, module, node in lean)
        elif module is not None:
            form = frozen_form(module, lean=False)
            if form is not None:
                edit.replace_leaf(node, form)
                count += sum(1 for m in form.modules() if getattr(m, "running_mean", None) is not None)
        elif node.op == "call_function" and node.target in NORM_FUNCTIONS:
            count += _freeze_norm_call(edit, node, node.target, node.args, node.kwargs, node in lean)
    return count


def _freeze_norm_call(edit: Editor, node: Node, norm: Any, args: Any, kwargs: Any, lean: bool) -> bool:
    flag, lean_form = NORM_FUNCTIONS[norm]
    bound = inspect.signature(norm).bind(*args, **kwargs)
    if bound.arguments.get("running_mean") is None:
        return False
    bound.arguments[flag] = False
    edit.set_call(node, lean_form if lean else norm, tuple(bound.args), dict(bound.kwargs))
    return True


def _freeze_switched_norm(edit: Editor, node: Node, module: ByMode, lean: bool) -> bool:
    """A norm function that was traced with `training=self.training`: the call of eval mode serves both modes."""
    inputs = node.args
    args, kwargs = fx.node.map_aggregate(module.eval_arguments, lambda a: inputs[a] if isinstance(a, Slot) else a)
    return _freeze_norm_call(edit, node, module.function, args, kwargs, lean)


# -- lean operators ---------------------------------------------------------------------------------------------------------
def use_lean_operators(edit: Editor, nodes: Sequence[Node]) -> dict[str, int]:
    """Puts lean operators in place of stock ones at `nodes`, all frozen. Returns how many nodes of each kind changed."""
    graph, done, members, seen = edit.graph, Counter[str](), set(nodes), set[Node]()
    order = dict(graph.order)
    memory = {n: storages(n) for n in order}
    for node in nodes:
        if node in seen:
            continue
        # A leaf may be called more than once (ResNet's `relu`): its calls change together or not at all.
        calls = edit.calls(str(node.target)) if node.op == "call_module" else (node,)
        seen.update(calls)
        if any(c not in members for c in calls) or (_is_relu(graph, node) and all(_kept_by_a_user(graph, c) for c in calls)):
            continue
        if _is_gate(node) and writes_in_place(graph.module, node):
            if not all(_can_leave_its_input(c, order, memory) for c in calls):
                continue
            for call in calls:
                source = call.all_input_nodes[0]
                edit.redirect(source, call, [u for u in source.users if order[u] > order[call]])
        kind = _replace(edit, node)
        if kind:
            done[kind] += len(calls)
    return dict(sorted(done.items()))


def _replace(edit: Editor, node: Node) -> str | None:
    """The lean form of one operator, for all its calls; its kind, or None where the stock one is as lean."""
    stock = leaf(edit.graph, node)
    if stock is not None:
        form = frozen_form(stock, lean=True)
        if form is None:
            return None
        edit.replace_leaf(node, form)
        return original_class(stock).__name__
    lean = _lean_function(node)
    if lean is None:
        return None
    edit.set_call(node, lean)
    return lean.__name__


def _lean_function(node: Node) -> Callable[..., Any] | None:
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def _is_relu(graph: Graph, node: Node) -> bool:
    module = leaf(graph, node)
    return isinstance(module, nn.ReLU) if module is not None else _lean_function(node) is activations.relu


def _is_gate(node: Node) -> bool:
    """Whether a node is a leaf, or a function or method that has a lean form: others stay as they are."""
    return node.op == "call_module" or _lean_function(node) is not None


def _kept_by_a_user(graph: Graph, node: Node) -> bool:
    """Whether a layer that trains saves this output anyway: a stock ReLU then saves the same tensor, and a mask would come on top."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return any(isinstance(leaf(graph, u), layers) and trainable(graph, u) for u in node.users)


def _can_leave_its_input(node: Node, order: dict[Node, int], memory: dict[Node, set[StorageWeakRef]]) -> bool:
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


# -- the prefix -------------------------------------------------------------------------------------------------------------
def cut_prefix(edit: Editor, prefix: Sequence[Node]) -> None:
    """Runs the frozen prefix without gradients, in the place of the shorter one that an earlier freeze has declared."""
    module = edit.graph.module

    def reads_parameters(piece: tuple[Node, ...]) -> bool:
        return any(True for n in piece for source in (n, *n.all_input_nodes) for _ in parameters_read(module, source))

    edit.remove_sections(lambda s: s.wrap is NoGrad and s.name.startswith(PREFIX))
    edit.outline(prefix, NoGrad, PREFIX, only=reads_parameters)
