"""One light operator in a block's place, built from its neighbours' weights (RepL, arXiv 2605.19533).

What stays of the block is its shortcut, one operator and that operator's norm; what else it held leaves the graph, with its weights, its
FLOPs and its activations. The published text that we could read does not fix the operator, so the choice is ours, by kind of block:

| block | what stays | forward FLOPs of the block |
|---|---|---|
| basic residual (two convolutions) | the last convolution, on the block's input, and its norm | 1/2 |
| bottleneck (1x1, kxk, 1x1) | the 1x1 pair as one convolution in factored form, and the last norm | 0.47 (k = 3) |
| transformer | one half: the attention (default) or the MLP, with its norm and shortcut | about 1/3, 2/3 |
| ConvNeXt | the depthwise convolution, its norm and the layer scale | 0.03 at width 192 |
| plain unit (VGG) | a partial convolution on a quarter of the channels (arXiv 2303.03667), with a norm where the unit had one | 1/16 |

The plain unit gains a shortcut, because without one a quarter of the channels could not stand for all.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, parameters_of
from graphopt.ir.regions import Region
from graphopt.passes.share.parts import Unfit, attention_path, is_norm, part_of

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: share of the channels that a plain unit's partial convolution works on
PARTIAL = 4


@dataclass(frozen=True)
class Operator:
    """What stays of a block.

    Attributes:
        part: of a transformer block, which half.
        kept: names of the weights that become mixes. norms: names of the parameters of the norms that stay.
        stretches: (last, first) activations; readers of `last` read `first` instead, and what lay between is gone.
        partial: the convolution's node, where it becomes a partial one.
    """

    part: Literal["attention", "mlp", "all"]
    kept: tuple[str, ...]
    norms: tuple[str, ...]
    stretches: tuple[tuple[fx.Node, fx.Node], ...] = ()
    partial: fx.Node | None = None


@dataclass(frozen=True)
class _Residual:
    """A sum of a shortcut without weights and a branch with some."""

    sum: fx.Node
    shortcut: fx.Node
    branch: tuple[fx.Node, ...]


def surrogate_of(graph: Graph, block: Region, part: Literal["attention", "mlp", "all"] | None) -> Operator:
    """What a block's surrogate would be.

    Raises:
        Unfit: with the reason.
    """
    if not block.closed:
        raise Unfit(f"it has {len(block.entries)} ways in and {len(block.exits)} out: one operator cannot stand in its place")
    attention = attention_path(graph, block)
    if attention is None and part in ("attention", "mlp"):
        raise Unfit(f"it has no attention: parts = {part!r} is for transformer blocks")
    residuals = _residuals(graph, block)
    if attention is not None:
        return _half(graph, block, residuals, attention, part or "attention")
    if not residuals:
        return _plain(graph, block)
    if len(residuals) > 1:
        raise Unfit(f"it has {len(residuals)} shortcuts and no attention: no light operator is known for it")
    return _convolutional(graph, block, residuals[0])


# -- kinds of blocks ------------------------------------------------------------------------------------------------------------
def _half(graph: Graph, block: Region, residuals: list[_Residual], attention: str, part: str) -> Operator:
    if part == "all":
        raise Unfit('a whole transformer block is no light operator: parts = "attention" or "mlp", or mode = "mix"')
    if attention == block.paths[0]:
        raise Unfit("its attention is written in its own forward, with no module that could be told apart")
    wanted = [n for n in part_of(graph, block, part) if not is_norm(graph, n)]
    stays = [r for r in residuals if set(parameters_of(graph, r.branch)) & set(wanted)]
    goes = [r for r in residuals if r not in stays]
    if len(stays) != 1 or not goes:
        raise Unfit(f"its {part} is not one branch beside one shortcut: no half of it can stand alone")
    norms = tuple(n for n in parameters_of(graph, stays[0].branch) if is_norm(graph, n))
    kept = tuple(n for n in parameters_of(graph, stays[0].branch) if n in wanted)
    return Operator("attention" if part == "attention" else "mlp", kept, norms, _checked((r.sum, r.shortcut) for r in goes))


def _convolutional(graph: Graph, block: Region, residual: _Residual) -> Operator:
    layers = [n for n in residual.branch if _weights(graph, n)]
    modules = [graph.module.get_submodule(str(n.target)) if n.op == "call_module" else None for n in layers]
    pointwise = [isinstance(m, nn.Linear) or (isinstance(m, _CONVOLUTIONS) and set(m.kernel_size) == {1}) for m in modules]
    leaves = [i for i, m in enumerate(modules) if m is not None]  # a layer scale is a tensor, not a leaf
    first, last = (leaves[0], leaves[-1]) if leaves else (0, 0)
    shape = [pointwise[i] for i in leaves]
    stretches: tuple[tuple[fx.Node, fx.Node], ...]
    if shape == [False, True, True] and getattr(modules[first], "groups", 1) > 1:
        stays = (layers[first],)
        stretches = ((layers[last], _input(layers[leaves[1]])),)
    elif shape == [True, False, True]:
        stays = (layers[first], layers[last])
        stretches = ((_input(layers[last]), layers[first]),)
    elif len(shape) == 2 and all(isinstance(modules[i], _CONVOLUTIONS) for i in leaves):
        stays = (layers[last],)
        stretches = ((_input(layers[last]), _input(layers[first])),)
    else:
        raise Unfit(f"its branch has {len(shape)} layers with weights, in no arrangement that a light operator is known for")
    kept = tuple(n for layer in stays for n in parameters_of(graph, [layer]))
    gone = _between(stretches)
    norms = tuple(n for n in parameters_of(graph, [b for b in residual.branch if b not in gone]) if is_norm(graph, n))
    return Operator("all", kept, norms, _checked(stretches))


def _plain(graph: Graph, block: Region) -> Operator:
    layers = [n for n in block.nodes if _weights(graph, n)]
    module = graph.module.get_submodule(str(layers[0].target)) if len(layers) == 1 and layers[0].op == "call_module" else None
    if not isinstance(module, _CONVOLUTIONS):
        raise Unfit("it has no shortcut without weights, and is no plain convolution unit: no light operator is known for it")
    if module.in_channels != module.out_channels or _input(layers[0]).meta["val"].shape != layers[0].meta["val"].shape:
        raise Unfit(f"it takes {module.in_channels} channels to {module.out_channels} or changes their size: nothing can pass it by")
    if module.groups != 1 or module.padding_mode != "zeros" or module.in_channels < PARTIAL:
        raise Unfit("its convolution is grouped, padded otherwise than by zeros, or has too few channels for a partial one")
    return Operator("all", parameters_of(graph, layers), (), (), layers[0])


# -- the graph's structure ------------------------------------------------------------------------------------------------------
def _residuals(graph: Graph, block: Region) -> list[_Residual]:
    """The sums of a block that add a branch with weights to a shortcut without.

    Raises:
        Unfit: a sum's shortcut has weights too.
    """
    active, inside = activations(graph), set(block.nodes)
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in block.nodes:
        own = [i for i in node.all_input_nodes if i in inside]
        before[node] = frozenset(own).union(*(before[i] for i in own))
    found = []
    for node in block.nodes:
        operands = [a for a in node.args if isinstance(a, fx.Node) and a in active]
        if node.target not in _SUMS or len(operands) != 2 or any(_shape(o) != _shape(node) for o in operands):
            continue
        reach = [before.get(o, frozenset()) | {o} for o in operands]
        sides = [[n for n in block.nodes if n in reach[i] and n not in reach[1 - i]] for i in (0, 1)]
        weighted = [bool(parameters_of(graph, side)) for side in sides]
        if all(weighted):
            raise Unfit("its shortcut has weights of its own (a change of width or stride)")
        if any(weighted):
            branch = sides[weighted.index(True)]
            found.append(_Residual(node, operands[weighted.index(False)], tuple(branch)))
    # A sum inside another's branch (a response norm's, a local enhancement's) is part of that branch.
    return [r for r in found if not any(r.sum in other.branch for other in found)]


def _weights(graph: Graph, node: fx.Node) -> bool:
    return any(not is_norm(graph, n) for n in parameters_of(graph, [node]))


def _input(node: fx.Node) -> fx.Node:
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "shape", None)


def _checked(stretches: Iterable[tuple[fx.Node, fx.Node]]) -> tuple[tuple[fx.Node, fx.Node], ...]:
    stretches = tuple(stretches)
    for last, first in stretches:
        if _shape(last) != _shape(first):
            raise Unfit("what would leave it changes the shape of its activation: a stride, or a change of width")
    return stretches


def _between(stretches: Iterable[tuple[fx.Node, fx.Node]]) -> set[fx.Node]:
    """Nodes that only lead to the ends of stretches, the ends included."""
    gone: set[fx.Node] = set()
    for last, first in stretches:
        pending = [last]
        while pending:
            node = pending.pop()
            if node is not first and node not in gone and all(u in gone for u in node.users if node is not last):
                gone.add(node)
                pending += node.all_input_nodes
    return gone


# -- rewriting ------------------------------------------------------------------------------------------------------------------
def take_out(graph: Graph, block: Region, found: Operator) -> None:
    """Removes what a block's surrogate does without: nodes, modules, parameters and buffers."""
    read, alive = _names_read(graph), _alive(block)
    replaced = dict(found.stretches)
    for last, first in found.stretches:
        while first in replaced:
            first = replaced[first]
        last.replace_all_uses_with(first)
    # An assert feeds nothing: it goes only where what it looks at goes.
    dead = alive - _alive(block)
    for node in block.nodes:
        if node not in alive and any(i in dead for i in node.all_input_nodes):
            dead.add(node)
    for node in reversed(block.nodes):
        if node in dead:
            graph.fx.erase_node(node)
    _forget(graph, read - _names_read(graph), block.paths)


def _alive(block: Region) -> set[fx.Node]:
    """Nodes of a block from which something leaves it."""
    inside, alive = set(block.nodes), set[fx.Node]()
    for node in reversed(block.nodes):
        if any(u not in inside or u in alive for u in node.users):
            alive.add(node)
    return alive


def _names_read(graph: Graph) -> set[str]:
    """Names of all parameters and buffers that nodes read."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            found.add(str(node.target))
        elif node.op == "call_module":
            module = graph.module.get_submodule(str(node.target))
            found.update(f"{node.target}.{n}" for n, _ in (*module.named_parameters(), *module.named_buffers()))
            found.add(str(node.target))
    return found


def _forget(graph: Graph, names: set[str], paths: tuple[str, ...]) -> None:
    for name in sorted(names):
        if not any(name == p or name.startswith(f"{p}.") for p in paths):
            continue
        parent, _, last = name.rpartition(".")
        try:
            owner = graph.module.get_submodule(parent)
        except AttributeError:
            continue  # gone with the leaf that held it
        for registry in (owner._parameters, owner._buffers, owner._modules):
            registry.pop(last, None)
        owner._non_persistent_buffers_set.discard(last)


def partial_slice(graph: Graph, source: fx.Node, width: int, name: str) -> fx.Node:
    """The part of a neighbour's tensor that a partial convolution uses: its first `width` channels, both ways."""
    index = (slice(None, width), slice(None, width)) if name.endswith("weight") else slice(None, width)
    return graph.fx.call_function(operator.getitem, (source, index))


def make_partial(graph: Graph, conv: fx.Node) -> tuple[list[fx.Node], dict[str, int]]:
    """Makes a plain unit's convolution work on its first channels only, with a shortcut for all: `x + pad(norm(conv(x[:, :width])))`.

    The unit's norm is narrowed to these channels. The convolution's weights are the caller's to replace.

    Returns:
        The nodes that are new, and of each narrowed tensor the new length.
    """
    x, width, shape = _input(conv), partial_width(conv), conv.meta["val"].shape
    norm = next((u for u in conv.users if _is_batch_norm(graph, u)), None) if len(conv.users) == 1 else None
    end, narrowed = norm or conv, {}
    if norm is not None:
        path = str(norm.target)
        narrow = _narrowed(graph.module.get_submodule(path), width)
        graph.replace_module(path, narrow)
        narrowed = {f"{path}.{k}": width for k, v in narrow.state_dict().items() if v.ndim}
    with graph.fx.inserting_before(conv):
        head = graph.fx.call_function(operator.getitem, (x, (slice(None), slice(None, width))))
    conv.args, conv.kwargs = (head,), {}
    for node in {conv, end}:
        node.meta["val"] = node.meta["val"][:, :width]
    with graph.fx.inserting_after(end):
        padded = graph.fx.call_function(F.pad, (end, (0, 0) * (len(shape) - 2) + (0, shape[1] - width)))
    with graph.fx.inserting_after(padded):
        total = graph.fx.call_function(operator.add, (x, padded))
    end.replace_all_uses_with(total, delete_user_cb=lambda user: user is not padded)
    return [head, padded, total], narrowed


def _narrowed(norm: nn.Module, width: int) -> nn.Module:
    norm = copy.deepcopy(norm)
    norm.num_features = width  # type: ignore[assignment]
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            norm._parameters[name] = nn.Parameter(parameter.detach()[:width].clone(), parameter.requires_grad)
    for name, buffer in norm._buffers.items():
        if buffer is not None and buffer.ndim:
            norm._buffers[name] = buffer[:width].clone()
    return norm


def partial_width(conv: fx.Node) -> int:
    return math.ceil(conv.meta["val"].shape[1] / PARTIAL)


def _is_batch_norm(graph: Graph, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.module.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm)
