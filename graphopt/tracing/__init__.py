"""`nn.Module` -> `Graph`: one graph that serves train and eval mode, bit for bit."""

import copy
import keyword
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedParameter

from graphopt.errors import TraceError, first_line
from graphopt.ir.collector import uncollected
from graphopt.ir.grad_mode import recording
from graphopt.ir.graph import Graph, Opaque, Origin
from graphopt.ir.inputs import Input, as_input, show
from graphopt.ir.module import TrainingModule, skeleton
from graphopt.ir.paths import owner
from graphopt.ir.section import BACKBONE, Section
from graphopt.ir.shapes import forward_bytes, propagate_shapes, tensors_in, uncached
from graphopt.runtime.body import Checkpointed
from graphopt.tracing.checkpointing import noting_checkpoints
from graphopt.tracing.equivalence import compare_modes, same, without_gradient
from graphopt.tracing.modes import Difference, merge_modes
from graphopt.tracing.tracer import Tracer, constants_of, meta_copy
from graphopt.units import show_size

#: stop tracing after this many opaque modules: too little of the model would be visible to the passes
MOST_OPAQUE = 64
#: the most memory that running backbone and graph for a comparison may take
MOST_BYTES = 4 * 2**30


@recording()
def trace(backbone: nn.Module, input: Input, *, compare: bool = True) -> Graph:
    """Traces a backbone. The graph shares its parameters; the backbone itself is left as it was.

    Args:
        backbone: takes one tensor (N, *input), or several.
        input: shape of one sample, e.g. (3, 224, 224). Several inputs: a tuple of such shapes, in the order of the forward's arguments; one
            of whole numbers or booleans (tokens, a mask) is (shape, dtype): `((3, 224, 224), ((16,), torch.int64))`.
        compare: run backbone and graph on random input in both modes, and require bit-equal outputs (not for weights on the meta device).

    Raises:
        TraceError: the forward of the backbone itself (not of a part of it) cannot be traced, or cannot take such an input.
    """
    input = _checked_input(backbone, input)
    was_training = {m: m.training for m in backbone.modules()}
    opaque: list[Opaque] = []
    meta = cache(lambda: meta_copy(backbone))
    try:
        while True:
            try:
                with uncached(backbone):
                    graph = _trace_once(backbone, input, meta, opaque)
                if compare and not any(p.is_meta for p in backbone.parameters()):
                    _check_memory(graph)
                    differing = compare_modes(backbone, graph)
                    if differing is not None:
                        raise _Untraceable(differing[0], f"its output in {differing[1]} mode differs from the backbone's when traced")
                    if graph.opaque or any(map(_hides_gradients, graph.nodes)):
                        graph.unused = tuple(dict.fromkeys((*graph.unused, *without_gradient(graph))))
                break
            except _Untraceable as found:
                _make_opaque(opaque, *found.args)
    finally:
        for module, training in was_training.items():
            module.training = training
    modes = {path: m.training for path, m in backbone.named_modules()}
    for path, module in graph.module.named_modules():
        module.training = modes.get(path, backbone.training)
    return graph


def _hides_gradients(node: fx.Node) -> bool:
    """Whether parameters may get no gradient because of this node: it detaches, makes whole numbers, or nothing reads what it computes."""
    if node.target in ("detach", "detach_", Tensor.detach, Tensor.detach_) or (not node.users and node.op not in ("output", "placeholder")):
        return True
    made, *given = (tensors_in(n.meta.get("val")) for n in (node, *node.all_input_nodes))
    whole = made and not any(t.is_floating_point() or t.is_complex() for t in made)
    return bool(whole) and any(t.is_floating_point() for tensors in given for t in tensors)


def _checked_input(backbone: nn.Module, given: Input) -> Input:
    """The input in tuples; raises TraceError if it is none, or if the backbone cannot be traced whatever it is given."""
    lazy = next((n for n, p in backbone.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if lazy is not None:
        raise TraceError(f"the parameter {lazy} has no shape yet (a lazy module)", fix="Run one batch through the backbone first")
    inference = next((n for n, t in backbone.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and t.is_inference()), None)
    if inference is not None:
        raise TraceError(f"{inference} was made in torch.inference_mode and can never train", fix="Build the backbone outside of it")
    try:
        input = as_input(given)
    except ValueError as error:
        raise TraceError(str(error), fix="Give the shape of one sample, (3, 224, 224) for example") from None
    scripted = next((n for n, m in backbone.named_modules() if _has_scripted_parameters(m)), None)
    if scripted is not None:
        what = f"{scripted or 'the backbone'} is a scripted module with parameters, of which torch cannot make a copy that trains"
        raise TraceError(what, fix="Give the Python module that was scripted")
    return input


def _check_memory(graph: Graph) -> None:
    """Refuses a comparison that would take the machine's memory."""
    needed = forward_bytes(graph.module)
    if needed > MOST_BYTES:
        what = f"comparing the graph with the backbone on two samples takes {show_size(needed)}, more than {show_size(MOST_BYTES)}"
        raise TraceError(what, fix='Give a smaller input, or set verify = "off", which leaves the comparison out')


def _has_scripted_parameters(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None


class _Untraceable(Exception):
    """A module that has to stay whole: its path, and the reason."""


@uncollected()
def _trace_once(backbone: nn.Module, input: Input, meta: Callable[[], nn.Module], opaque: Sequence[Opaque]) -> Graph:
    both = (_trace_mode(backbone, training, Tracer(input, meta, (o.path for o in opaque))) for training in (True, False))
    (traced, constants, segments), (in_eval, eval_constants, _) = both
    if not same(constants, eval_constants):
        raise _Untraceable("", "its constants depend on the mode")
    try:
        switches = merge_modes(traced, in_eval, _scope_of)
    except Difference as difference:
        raise _Untraceable(difference.args[0], "its structure depends on the mode") from None
    nodes = traced.nodes
    _check_names(traced)
    module = TrainingModule(_root_for(backbone, traced, switches, constants), traced, type(backbone).__name__)
    for node in nodes:
        node.meta["origin"] = _origin_of(node)
        node.meta.pop("nn_module_stack", None)
    propagate_shapes(module, input)
    used = {n.target for n in nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in nodes if n.op == "call_module")
    reached = {id(module.get_parameter(n)) for n, _ in module.named_parameters() if n in used or n.startswith(called)}
    unused = tuple(n for n, p in backbone.named_parameters() if id(p) not in reached)
    types = {path: type(m).__name__ for path, m in backbone.named_modules()}
    first = {m: path for path, m in backbone.named_modules()}
    aliases = {path: first[m] for path, m in backbone.named_modules(remove_duplicate=False) if first[m] != path}
    graph = Graph(module, input, types, _author_groups(backbone), tuple(opaque), unused, aliases)
    alive = set(nodes)
    for number, segment in enumerate(segments):
        if members := tuple(n for n in segment if n in alive):
            graph.sections.append(Section(f"backbone_checkpoint_{number}", members, Checkpointed, BACKBONE))
    return graph


#: what a graph module itself calls `meta`, `graph`, `code`: no part of a backbone can have such a name
_OWN_NAMES = {*dir(fx.GraphModule), "meta"} - set(dir(nn.Module))


def _check_names(graph: fx.Graph) -> None:
    """Refuses names of modules that a graph cannot hold: fx writes them into its code as they are, and has attributes of its own."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = node.target.split(".")
            wrong = next((part for part in parts if keyword.iskeyword(part) or re.search(r"""[\\"'\n\r]""", part)), None)
            wrong = wrong or (parts[0] if parts[0] in _OWN_NAMES else None)
            if wrong is not None:
                raise TraceError(f"a module or a parameter cannot be called {wrong!r} in a graph", where=node.target, fix="Rename it")


def _trace_mode(backbone: nn.Module, training: bool, tracer: Tracer) -> tuple[fx.Graph, dict[str, Tensor], list[tuple[fx.Node, ...]]]:
    """The graph of one mode, the constants that tracing made, and the nodes of each checkpointed segment."""
    own = {*dict(backbone.named_parameters()), *dict(backbone.named_buffers())}
    backbone.train(training)
    with _restored(backbone) as reassigned, noting_checkpoints(backbone, lambda: tracer.graph) as segments:
        error: Exception | None = None
        try:
            with torch.enable_grad():
                graph = tracer.trace(backbone)
        except TraceError:
            raise
        except Exception as caught:
            error = caught
        changed = reassigned()
        if changed:
            raise _Untraceable(changed[0], "its forward assigns to its own buffers or parameters") from error
        if error is not None:
            if not tracer.failed and not isinstance(error, fx.proxy.TraceError):
                raise TraceError(
                    f"the backbone does not take an input of shape {show(tracer.input)}: {first_line(error)}",
                    fix="Give the input shape that the backbone was built for ([backbone] input, and its image size argument)",
                ) from error
            raise _Untraceable(tracer.failed or "", f"cannot be traced: {first_line(error)}") from error
        if tracer.drew is not None:
            raise _Untraceable(tracer.drew, "draws from Python's random generator, of which a graph would repeat one draw")
        return graph, constants_of(backbone, graph, own), segments


@contextmanager
def _restored(backbone: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Whatever tracing leaves on modules is taken off again: constants, and what forwards assign to `self`.

    Gives a function that lists the paths of modules whose buffers or parameters have been assigned to.
    """
    python = ((path, m) for path, m in backbone.named_modules() if not isinstance(m, torch.jit.ScriptModule))
    before = [(path, m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for path, m in python]
    containers = [
        (value, copy.copy(value)) for _, _, own, _, _ in before for value in own.values() if type(value) in (dict, OrderedDict, list, set)
    ]

    def reassigned() -> list[str]:
        return [
            path
            for path, module, _, *tensors in before
            for now, former in zip((module._buffers, module._parameters), tensors, strict=True)
            if any(now.get(name) is not value for name, value in former.items())
        ]

    try:
        yield reassigned
    finally:
        for container, value in containers:
            container.clear()
            container.extend(value) if isinstance(value, list) else container.update(value)
        for _, module, own, buffers, parameters in before:
            own["training"] = module.training
            for current, former in ((module.__dict__, own), (module._buffers, buffers), (module._parameters, parameters)):
                current.clear()
                current.update(former)


def _make_opaque(opaque: list[Opaque], path: str, reason: str) -> None:
    """Adds a module to the opaque ones; its container, if it is one of them already."""
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
    call = key.rpartition("@")[2]
    return Origin(path, int(call) if "@" in key and call.isdigit() else 0)


def _root_for(backbone: nn.Module, graph: fx.Graph, switches: Mapping[str, nn.Module], constants: dict[str, Tensor]) -> nn.Module:
    """A root for the graph: what the backbone registers, plus modules that depend on the mode and constants, without state-dict keys."""
    root = skeleton(backbone, frozenset(n.target for n in graph.nodes if n.op == "call_module"))
    if any(target.startswith("by_mode.") for target in switches):
        root.add_module("by_mode", nn.Module())
    for target, switch in switches.items():
        root.get_submodule(owner(target)).add_module(target.rpartition(".")[2], switch)
    for name, value in constants.items():
        root.register_buffer(name, value, persistent=False)
    return root


def _author_groups(backbone: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The layers into which timm groups the parameters of this model (`group_matcher`), in order; empty if it does not."""
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        return ()
    from timm.models import group_parameters

    try:
        groups = group_parameters(backbone, matcher(coarse=False))
    except Exception:  # it does not fit its own model: blocks are found by structure instead
        return ()
    return tuple(tuple(names) for _, names in sorted(groups.items()))
