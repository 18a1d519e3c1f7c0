"""Emission: the flat graph becomes the module that trains, with its sections outlined.

Passes rewrite one flat graph. What has to run as a unit (a stretch under no_grad, a checkpointed one, a locally supervised one) is declared
as a `Section` and becomes a nested module only here, after all passes. The parameters stay where they are: a section's body shares
leaf modules with the root and is not registered, and tensors that the graph reads itself are read by the root and passed in.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.trace.graph import Graph, Origin, TrainingModule


@dataclass(frozen=True)
class Section:
    """A stretch of the flat graph that runs as one unit in the emitted module.

    Attributes:
        name: unique; the wrapper becomes `sections.<name>`.
        nodes: in any order; their activations must flow out of the stretch only forward (no way out and back in).
        wrap: makes the module that runs it from its body. The wrapper's forward takes the body's inputs and returns the body's
            output: a tensor, or a tuple where several leave. With `target` it takes the target before those, and
            returns `(output, local_loss)`; the loss is None in eval mode.
        by: name of the pass.
        target: whether the wrapper wants the training target.
        image: whether it wants the network's input too, right after the target.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    wrap: Callable[[fx.GraphModule], nn.Module]
    by: str
    target: bool = False
    image: bool = False


class Body:
    """Holds a section's graph module without registering it: its leaf modules are registered once, at the root."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] | None = None

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the leaf modules the body calls, nested sections' included, each once.

        Where they are kept is looked up once, which parameters those are every time: moving a module may replace them.
        """
        if self._slots is None:
            self._slots = [(m._parameters, name) for body in self._bodies() for m in body.modules() for name in m._parameters]
        return list({id(p): p for holder, name in self._slots if (p := holder[name]) is not None}.values())

    def _bodies(self) -> list[nn.Module]:
        found: list[nn.Module] = [self.module]
        for module in self.module.modules():
            for value in vars(module).values():
                if isinstance(value, Body):
                    found += value._bodies()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}


class NoGrad(nn.Module):
    """Runs a section without recording it: nothing in it trains, so nothing of it is saved."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.body(*inputs)


class WithLocalLoss(nn.Module):
    """The emitted module's output where sections have losses of their own: `(output, local_loss)` in training, `output` in eval."""

    def forward(self, output: Any, *losses: torch.Tensor | None) -> Any:
        if not self.training:
            return output
        present = [loss for loss in losses if loss is not None]
        return output, torch.stack(present).sum() if len(present) > 1 else present[0]


def emit(graph: Graph, *, start: fx.Node | None = None, stop: fx.Node | None = None) -> TrainingModule:
    """The module that trains. Leaves, parameters and buffers are shared with `graph`, which stays flat.

    Args:
        start: an activation that takes the input's place; what only led to it is gone.
        stop: an activation that takes the output's place.

    Raises:
        PassError: two sections overlap without one holding the other, or a section has a way out and back in.
    """
    flat = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = graph.nodes if stop is None else graph.nodes[: graph.nodes.index(stop) + 1]
    for node in nodes:
        if node is start:
            with flat.inserting_before(next(iter(flat.nodes))):
                features = flat.placeholder("features")
            features.meta = dict(node.meta)
            copies[node] = features
            continue
        copies[node] = flat.node_copy(node, lambda n: copies[n])
    if stop is not None:
        flat.output(copies[stop])
    _drop_dead(flat, graph.module, keep_input=start is None)
    alive = set(flat.nodes)
    root = nn.Module()
    root.__dict__.update(
        {k: v for k, v in graph.module.__dict__.items() if k in ("_parameters", "_buffers", "_non_persistent_buffers_set", "training")}
    )
    root._modules = dict(graph.module._modules)
    sections = []
    for section in graph.sections:
        members = tuple(copies[n] for n in section.nodes if n in copies and copies[n] in alive and n is not start)
        if any(m.op != "get_attr" for m in members):
            sections.append((section, members))
    _demand_nesting(sections)
    losses: list[fx.Node] = []
    target: fx.Node | None = None
    if sections:
        root.add_module("sections", nn.Module())
    holder: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}
    # Inner before outer; of two that hold the same nodes, the one with a loss of its own is the outer.
    for section, members in sorted(sections, key=lambda s: (len(s[1]), s[0].target)):
        if section.target and target is None:
            last = [n for n in flat.nodes if n.op == "placeholder"][-1]
            with flat.inserting_after(last):
                target = flat.placeholder("target", default_value=None)
            target.meta = {"origin": Origin("", 0), "by": section.by}
        # An inner section stands as its call, with what takes the call's outputs apart.
        current = tuple(dict.fromkeys(n for m in members for n in parts.get(holder.get(m, m), (holder.get(m, m),))))
        known = set(flat.nodes)
        call, loss, inside = _outline(flat, root, section, current, target)
        parts[call] = (call, *(n for n in flat.nodes if n not in known and n is not call))
        if loss is not None:
            losses.append(loss)
        for member in members:
            holder[member] = call
        for member, owner in list(holder.items()):
            if owner in inside:
                holder[member] = call
    if losses and stop is None:
        output = next(n for n in reversed(flat.nodes) if n.op == "output")
        root.get_submodule("sections").add_module("output", WithLocalLoss())
        order = {n: i for i, n in enumerate(flat.nodes)}
        with flat.inserting_before(output):
            final = flat.call_module("sections.output", (output.args[0], *sorted(losses, key=order.__getitem__)))
        final.meta = {"origin": Origin("", 0)}
        output.args = (final,)
    flat.lint()
    module = TrainingModule(root, flat, type(graph.module).__name__)
    return module


def _outline(
    flat: fx.Graph, root: nn.Module, section: Section, members: tuple[fx.Node, ...], target: fx.Node | None
) -> tuple[fx.Node, fx.Node | None, set[fx.Node]]:
    order = {n: i for i, n in enumerate(flat.nodes)}
    inside = {m for m in members if m.op not in ("get_attr", "placeholder", "output")}
    ordered = sorted(inside, key=order.__getitem__)
    inputs = list(dict.fromkeys(i for m in ordered for i in m.all_input_nodes if i not in inside))
    # Activations first, then tensors that the root reads for the body.
    inputs.sort(key=lambda n: (n.op == "get_attr", order[n]))
    leaving = [m for m in ordered if any(u not in inside for u in m.users)]
    _demand_convex(flat, section, inside)
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in ordered:
        copies[node] = body.node_copy(node, lambda n: copies[n])
    out = tuple(copies[n] for n in leaving)
    body.output(out[0] if len(out) == 1 else out)
    body.lint()
    wrapper = section.wrap(fx.GraphModule(root, body, f"Section_{section.name}"))
    wrapper.train(root.training)
    root.get_submodule("sections").add_module(section.name, wrapper)
    extra: tuple[fx.Node | None, ...] = (target,) if section.target else ()
    if section.image:
        first = next(n for n in flat.nodes if n.op == "placeholder")
        if first.name == "features":
            raise PassError(f"the stretch {section.name!r} needs the image, which is behind the cut", where=f"pass {section.by}")
        extra = (*extra, first)
    with flat.inserting_after(ordered[-1]):
        call = flat.call_module(f"sections.{section.name}", (*extra, *inputs))
    call.meta = {**{k: v for k, v in leaving[-1].meta.items() if k == "origin"}, "by": section.by, "section": section.name}
    result, loss = call, None
    if section.target:
        with flat.inserting_after(call):
            result = flat.call_function(operator.getitem, (call, 0))
        with flat.inserting_after(result):
            loss = flat.call_function(operator.getitem, (call, 1))
        result.meta, loss.meta = dict(call.meta), dict(call.meta)
    position = loss or result
    for number, node in enumerate(leaving):
        value = result
        if len(leaving) > 1:
            with flat.inserting_after(position):
                value = position = flat.call_function(operator.getitem, (result, number))
            value.meta = dict(node.meta)
        else:
            value.meta |= {k: v for k, v in node.meta.items() if k not in value.meta}
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(ordered):
        flat.erase_node(node)
    _in_order(flat)
    return call, loss, inside


def _in_order(graph: fx.Graph) -> None:
    """Restores a topological order with as few moves as possible, so that random operations keep their order."""
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [i for i in top.all_input_nodes if i not in placed]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            if top not in placed:
                placed.add(top)
                order.append(top)

    order: list[fx.Node] = []
    for node in list(graph.nodes):
        if node not in placed:
            place(node)
    if order != list(graph.nodes):
        for before, after in itertools.pairwise(order):
            before.append(after)


def _demand_convex(flat: fx.Graph, section: Section, inside: set[fx.Node]) -> None:
    after: set[fx.Node] = set()
    for node in flat.nodes:
        if node in inside:
            if any(i in after for i in node.all_input_nodes):
                through = next(i for i in node.all_input_nodes if i in after)
                raise PassError(
                    f"the stretch {section.name!r} has a way out and back in, through node {through}",
                    where=f"pass {section.by}",
                    fix="End it at a cut point (graphopt inspect shows them)",
                )
        elif any(i in inside or i in after for i in node.all_input_nodes):
            after.add(node)


def _demand_nesting(sections: list[tuple[Section, tuple[fx.Node, ...]]]) -> None:
    for i, (one, mine) in enumerate(sections):
        for other, theirs in sections[i + 1 :]:
            a = {n for n in mine if n.op != "get_attr"}
            b = {n for n in theirs if n.op != "get_attr"}
            if a & b and not (a <= b or b <= a):
                raise PassError(
                    f"{one.by}'s stretch {one.name!r} and {other.by}'s {other.name!r} overlap",
                    where=f"passes {one.by} and {other.by}",
                    fix="Let one hold the other whole: move a cut, or select other regions",
                )


def _drop_dead(graph: fx.Graph, module: nn.Module, *, keep_input: bool) -> None:
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or node.users or (node.op == "placeholder" and (keep_input or node.name == "features")):
            continue
        # An effect without a user (an assertion on the input's size) goes too once what it looks at is gone.
        if node.op == "call_function" and "assert" in getattr(node.target, "__name__", "") and keep_input:
            continue
        # So does a change in place (`self.relu(x)`, result dropped), but not while the same memory is read after it.
        if _changes_in_place(module, node):
            changed = _memory(node)
            if any(order[u] > order[node] for n in graph.nodes if n is not node and changed & _memory(n) for u in n.users):
                continue
        graph.erase_node(node)


def _changes_in_place(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or bool(node.kwargs.get("inplace")) or (node.op == "call_function" and any(a is True for a in node.args))


def _memory(node: fx.Node) -> set[StorageWeakRef]:
    """Storages behind a node's value; two nodes whose sets meet share memory."""
    return {StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)}
