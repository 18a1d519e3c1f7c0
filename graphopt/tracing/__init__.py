"""`nn.Module` -> `Graph`: one graph that serves train and eval mode, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import fx, nn

from graphopt.errors import TraceError
from graphopt.ir.graph import Graph, Opaque, Origin
from graphopt.ir.module import TrainingModule, skeleton
from graphopt.ir.shapes import propagate_shapes
from graphopt.tracing.equivalence import compare_modes, same
from graphopt.tracing.modes import Difference, merge_modes
from graphopt.tracing.tracer import Tracer, constants_of, optional_arguments

__all__ = ["Graph", "Opaque", "Origin", "TrainingModule", "trace"]

#: stop tracing after this many opaque modules: too little of the model would be visible to the passes
MOST_OPAQUE = 64


def trace(backbone: nn.Module, input: tuple[int, ...], *, compare: bool = True) -> Graph:
    """Traces a backbone. The graph shares its parameters; the backbone itself is left as it was.

    Args:
        backbone: takes one tensor (N, *input).
        input: shape of one sample, e.g. (3, 224, 224).
        compare: run backbone and graph on random input in both modes, and require bit-equal outputs (not for weights on the meta device).

    Raises:
        TraceError: the forward of the backbone itself (not of a part of it) cannot be traced, or cannot take such an input.
    """
    was_training = {m: m.training for m in backbone.modules()}
    opaque: list[Opaque] = []
    try:
        while True:
            graph = _trace_once(backbone, tuple(input), opaque)
            if graph is None:
                continue
            if not compare or any(p.is_meta for p in backbone.parameters()):
                break
            differing = compare_modes(backbone, graph)
            if differing is None:
                break
            path, mode = differing
            _give_up_on(path, f"its output in {mode} mode differs from the backbone's when traced", opaque)
    finally:
        for module, training in was_training.items():
            module.training = training
    modes = {path: m.training for path, m in backbone.named_modules()}
    for path, module in graph.module.named_modules():
        module.training = modes.get(path, backbone.training)
    return graph


def _trace_once(backbone: nn.Module, input: tuple[int, ...], opaque: list[Opaque]) -> Graph | None:
    """One attempt; None when a further module had to be declared opaque."""
    graphs: list[fx.Graph] = []
    own = {*dict(backbone.named_parameters()), *dict(backbone.named_buffers())}
    constants: list[dict[str, torch.Tensor]] = []
    for training in (True, False):
        backbone.train(training)
        tracer = Tracer(o.path for o in opaque)
        with _without_new_attributes(backbone):
            try:
                graphs.append(tracer.trace(backbone, optional_arguments(backbone)))
            except TraceError:
                raise
            except Exception as error:
                _give_up_on(tracer.failed or "", f"cannot be traced: {_reason(error)}", opaque)
                return None
            constants.append(constants_of(backbone, graphs[-1], own))
    if not same(*constants):
        _give_up_on("", "it makes other constants in each mode", opaque)
    train, eval_ = graphs
    try:
        switches = merge_modes(train, eval_, _scope_of)
    except Difference as difference:
        _give_up_on(difference.path, "its structure depends on the mode", opaque)
        return None
    module = TrainingModule(_root_for(backbone, train, switches, constants[0]), train, type(backbone).__name__)
    for node in train.nodes:
        node.meta["origin"] = _origin_of(node)
        node.meta.pop("nn_module_stack", None)
        if node.op == "placeholder" and node.name != "x":
            node._rename("x")
            node.target = node.name
    module.recompile()
    propagate_shapes(module, input)
    used = {n.target for n in train.nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in train.nodes if n.op == "call_module")
    reached = {id(module.get_parameter(n)) for n, _ in module.named_parameters() if n in used or n.startswith(called)}
    unused = tuple(n for n, p in backbone.named_parameters() if id(p) not in reached)
    types = {path: type(m).__name__ for path, m in backbone.named_modules()}
    return Graph(module, input, types, _author_groups(backbone), tuple(opaque), unused)


@contextmanager
def _without_new_attributes(module: nn.Module) -> Iterator[None]:
    """Tracing parks constants on the root it traces: they are taken off again."""
    attributes, buffers = set(module.__dict__), set(module._buffers)
    try:
        yield
    finally:
        for name in set(module.__dict__) - attributes:
            del module.__dict__[name]
        for name in set(module._buffers) - buffers:
            del module._buffers[name]


def _give_up_on(path: str, reason: str, opaque: list[Opaque]) -> None:
    while path and any(o.path == path for o in opaque):
        path = path.rpartition(".")[0]
    if not path:
        raise TraceError(
            f"the backbone's own forward: {reason}",
            fix="Move the part of forward() that depends on values or on the mode into a module of its own: that one can stay whole",
        )
    opaque[:] = [o for o in opaque if not o.path.startswith(f"{path}.")]
    opaque.append(Opaque(path, reason))
    if len(opaque) > MOST_OPAQUE:
        raise TraceError(f"more than {MOST_OPAQUE} modules cannot be traced, the last is {path!r}: {reason}")


def _scope_of(node: fx.Node) -> str:
    """Path of the module whose forward made the node."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1] if stack else ""


def _origin_of(node: fx.Node) -> Origin:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return Origin("", 0)
    key, (path, _) = list(stack.items())[-1]
    call = key.rpartition("@")[2] if "@" in key else "0"
    return Origin(path, int(call) if call.isdigit() else 0)


def _root_for(backbone: nn.Module, graph: fx.Graph, switches: Mapping[str, nn.Module], constants: dict[str, torch.Tensor]) -> nn.Module:
    """A root for the graph: what the backbone registers, plus modules that depend on the mode and constants, without state-dict keys."""
    root = skeleton(backbone, frozenset(n.target for n in graph.nodes if n.op == "call_module"))
    if any(target.startswith("by_mode.") for target in switches):
        root.add_module("by_mode", nn.Module())
    for target, switch in switches.items():
        parent, _, name = target.rpartition(".")
        root.get_submodule(parent).add_module(name, switch)
    for name, value in constants.items():
        root.register_buffer(name, value, persistent=False)
    return root


def _author_groups(backbone: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The layers into which timm groups the parameters of this model (`group_matcher`), in order; empty if it does not."""
    matcher = getattr(backbone, "group_matcher", None)
    if not callable(matcher):
        return ()
    from timm.models import group_parameters

    try:
        groups = group_parameters(backbone, matcher(coarse=False))
    except Exception:  # the matcher does not fit its own model: blocks are found by structure instead
        return ()
    return tuple(tuple(names) for _, names in sorted(groups.items()))


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
