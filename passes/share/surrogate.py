"""One light operator in a block's place, with weights mixed from its neighbours' (RepL, arXiv 2605.19533).

The block keeps its shortcut, one operator and that operator's norm; everything else leaves the graph, with its weights, FLOPs and
activations. The accessible part of the paper does not fix the operator, so it is chosen here by kind of block:

| block | what stays | forward FLOPs of the block |
|---|---|---|
| basic residual (two convolutions) | the last convolution, on the block's input, and its norm | 1/2 |
| bottleneck (1x1, kxk, 1x1) | the 1x1 pair as one convolution in factored form, and the last norm | 0.47 (k = 3) |
| transformer | one half: the attention (default) or the MLP, with its norm and shortcut | about 1/3, 2/3 |
| ConvNeXt | the depthwise convolution, its norm and the layer scale | 0.03 at width 192 |
| plain unit (VGG) | a partial convolution on a quarter of the channels (arXiv 2303.03667), with a norm where the unit had one | 1/16 |

The plain unit gets a shortcut, because the other three quarters of its channels would be lost without one. A block's attention, MLP and
norms are found by structure (what the graph computes), with the libraries' names for MLPs (`mlp`, `ffn`) as a second hint.
"""

import copy
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt import Editor, Graph, Region
from graphopt.ir.nodes import leaf, parameters_of
from graphopt.ir.paths import is_below, lineage, owner
from graphopt.ir.patterns import Residual, attention_path, shape_of, weighted_sums
from graphopt.passes.share.options import Part

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: a partial convolution works on one channel in so many
PARTIAL = 4
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MLP_NAME = re.compile(r"(^|\.)(mlp|ffn|feed_?forward)(_|\d|\.|$)")


class NotShareable(Exception):
    """Why a block cannot be shared, or has no surrogate. Selection turns it into a diagnostic."""


def is_norm(graph: Graph, name: str) -> bool:
    """Whether a parameter belongs to a norm, by its owner's class (`BatchNorm2d`, `LayerNorm`, `GlobalResponseNorm`, ...)."""
    kind = graph.types.get(owner(name), "").lower()
    return "norm" in kind or kind.endswith("abn")


def part_of(graph: Graph, block: Region, part: Part) -> tuple[str, ...]:
    """Names of a block's parameters that belong to a part, norms among them; empty where it has no such part."""
    if part == "all":
        return block.parameters
    attention = attention_path(graph, block)
    attending = [n for n in block.parameters if attention is not None and is_below(n, [attention])]
    if part == "attention":
        return tuple(attending)
    others = (n for n in block.parameters if n not in attending)
    # A block's linear layers outside its attention are its MLP's, under whatever name.
    return tuple(n for n in others if _MLP_NAME.search(inside(n, block.paths)) or graph.types.get(owner(n), "").endswith("Linear"))


def inside(name: str, paths: Iterable[str]) -> str:
    """A tensor's name relative to the first of `paths` that holds it."""
    return next((name[len(p) + 1 :] for p in paths if name.startswith(f"{p}.")), name)


def leaves_of(names: Collection[str], calls: Callable[[str], Iterable[Node]]) -> tuple[str, ...]:
    """Paths of the leaf modules that own some of these parameters; `calls` gives the nodes that call the leaf at a path."""
    holding = {path for name in names for path in lineage(owner(name))}
    return tuple(dict.fromkeys(str(node.target) for node in sorted(node for path in holding for node in calls(path))))


def _calls(graph: Graph) -> dict[str, list[Node]]:
    """The nodes that call each leaf."""
    found: dict[str, list[Node]] = {}
    for node in graph.fx.find_nodes(op="call_module"):
        found.setdefault(str(node.target), []).append(node)
    return found


def check_mixable(graph: Graph, names: Collection[str]) -> None:
    """Checks that each of these parameters has one name, and that the leaves that own them can compute with mixed ones.

    Raises:
        NotShareable: one cannot, with the reason.
    """
    calls = graph.cached(_calls)
    for path in leaves_of(names, lambda path: calls.get(path, ())):
        leaf = graph.module.get_submodule(path)
        kind = f"{path} ({type(leaf).__name__})"
        if any(f"{path}.{n}" not in names for n, _ in leaf.named_parameters()):
            raise NotShareable(f"{kind} is one leaf, and only some of its parameters would be mixed")
        if next(leaf.buffers(), None) is not None and type(leaf) not in _BATCH_NORMS:
            raise NotShareable(f"{kind} is one leaf with buffers, so its weights cannot be mixed")
    known = graph.cached(_names_of_parameters)
    for name in names:
        alias = next((n for n in known.get(id(graph.module.get_parameter(name)), ()) if n != name), None)
        if alias is not None:
            raise NotShareable(f"{name} is one tensor with {alias}")


def _names_of_parameters(graph: Graph) -> dict[int, list[str]]:
    """All names of each parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for name, parameter in graph.module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


@dataclass(frozen=True)
class Surrogate:
    """What stays of a block.

    Attributes:
        part: of a transformer block, which half.
        weights: names of the weights that become mixes. norms: names of the parameters of the norms that stay.
        bypassed: activation -> the earlier one that its readers read instead; what only led to it is removed.
        partial: the convolution, where it becomes a partial one.
    """

    part: Part
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    bypassed: Mapping[Node, Node]
    partial: Node | None = None


def surrogate_of(graph: Graph, block: Region, part: Part | None) -> Surrogate:
    """What a block's surrogate would be. Changes nothing.

    Raises:
        NotShareable: it has none, with the reason.
    """
    if not block.closed:
        counts = f"{len(block.entries)} inputs and {len(block.exits)} outputs"
        raise NotShareable(f"it has {counts}, and a surrogate is one operator with one of each")
    attention = attention_path(graph, block)
    if attention is None and part in ("attention", "mlp"):
        raise NotShareable(f"it has no attention: parts = {part!r} is for transformer blocks")
    sums = weighted_sums(graph, block)
    if any(s.projected for s in sums):
        raise NotShareable("its shortcut has weights of its own (a change of width or stride)")
    if attention is not None:
        return _half(graph, block, sums, attention, part or "attention")
    if not sums:
        return _plain(graph, block)
    if len(sums) > 1:
        raise NotShareable(f"it has {len(sums)} shortcuts and no attention: no light operator is known for it")
    return _convolutional(graph, block, sums[0])


def _half(graph: Graph, block: Region, sums: tuple[Residual, ...], attention: str, part: Part) -> Surrogate:
    if part == "all":
        raise NotShareable('a whole transformer block is no light operator: use parts = "attention" or "mlp", or mode = "mix"')
    if attention == block.paths[0]:
        raise NotShareable("its own forward computes the attention: there is no module to separate from the rest of the block")
    wanted = [n for n in part_of(graph, block, part) if not is_norm(graph, n)]
    retained = [s for s in sums if set(parameters_of(graph, s.nodes)) & set(wanted)]
    removed = [s for s in sums if s not in retained]
    if len(retained) != 1 or not removed:
        raise NotShareable(f"its {part} is not one branch with one shortcut, so it cannot stand alone")
    names = parameters_of(graph, retained[0].nodes)
    norms = tuple(n for n in names if is_norm(graph, n))
    return Surrogate(part, tuple(n for n in names if n in wanted), norms, _checked({s.sum: s.shortcut for s in removed}))


def _convolutional(graph: Graph, block: Region, residual: Residual) -> Surrogate:
    # A layer scale is a parameter that the graph reads itself, and no leaf.
    layers = [(n, module) for n in residual.nodes if _has_weights(graph, n) and (module := leaf(graph, n)) is not None]
    nodes, modules = [n for n, _ in layers], [m for _, m in layers]
    pointwise = [_is_pointwise(m) for m in modules]
    if pointwise == [False, True, True] and getattr(modules[0], "groups", 1) > 1:
        retained, bypassed = nodes[:1], {nodes[2]: _input(nodes[1])}
    elif pointwise == [True, False, True]:
        retained, bypassed = [nodes[0], nodes[2]], {_input(nodes[2]): nodes[0]}
    elif len(nodes) == 2 and all(isinstance(m, _CONVOLUTIONS) for m in modules):
        retained, bypassed = nodes[1:], {_input(nodes[1]): _input(nodes[0])}
    else:
        raise NotShareable(f"its branch has {len(nodes)} layers with weights, in no arrangement that a light operator is known for")
    removed = _removed_nodes(block, bypassed)
    norms = tuple(n for n in parameters_of(graph, [b for b in residual.nodes if b not in removed]) if is_norm(graph, n))
    return Surrogate("all", parameters_of(graph, retained), norms, _checked(bypassed))


def _plain(graph: Graph, block: Region) -> Surrogate:
    layers = [n for n in block.nodes if _has_weights(graph, n)]
    module = leaf(graph, layers[0]) if len(layers) == 1 else None
    if not isinstance(module, _CONVOLUTIONS):
        raise NotShareable("it has no shortcut without weights, and is no plain convolution unit: no light operator is known for it")
    if module.in_channels != module.out_channels or shape_of(_input(layers[0])) != shape_of(layers[0]):
        change = f"takes {module.in_channels} channels to {module.out_channels} or changes their size"
        raise NotShareable(f"it {change}: it cannot get a shortcut")
    if module.groups != 1 or module.padding_mode != "zeros" or module.in_channels < PARTIAL:
        raise NotShareable("its convolution is grouped, pads with other values than zero, or has too few channels for a partial one")
    return Surrogate("all", parameters_of(graph, layers), (), {}, layers[0])


def _has_weights(graph: Graph, node: Node) -> bool:
    return any(not is_norm(graph, n) for n in parameters_of(graph, [node]))


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, _CONVOLUTIONS) and set(module.kernel_size) == {1})


def _input(node: Node) -> Node:
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, Node)
    return value


def _checked(bypassed: Mapping[Node, Node]) -> Mapping[Node, Node]:
    if any(shape_of(last) != shape_of(first) for last, first in bypassed.items()):
        raise NotShareable("the part to remove changes the shape of its activation (a stride, or a change of width)")
    return bypassed


def put_surrogate(edit: Editor, block: Region, surrogate: Surrogate, bypassed: dict[Node, Node]) -> tuple[int | None, frozenset[str]]:
    """Removes what a block's surrogate does not need: nodes, modules, parameters and buffers.

    Args:
        bypassed: what the surrogates that are in the graph have bypassed, which may have been the block's input; this one's is added.

    Returns:
        How many channels its convolution works on, where it is a partial one, and the names of its norm's tensors of that length.
    """
    bypassed |= surrogate.bypassed
    removed = _removed_nodes(block, surrogate.bypassed)
    groups = _names_read(edit.graph, removed)
    for last in surrogate.bypassed:
        edit.redirect(last, _final(last, bypassed))
    edit.erase(removed)
    gone = {name for leaf_path, names in groups.items() for name in _unread(edit, leaf_path, names)}
    edit.remove(sorted(name for name in gone if is_below(name, block.paths)))
    return (None, frozenset()) if surrogate.partial is None else _make_partial(edit, surrogate.partial, bypassed)


def _removed_nodes(block: Region, bypassed: Mapping[Node, Node]) -> set[Node]:
    """Nodes of a block that nothing needs once the readers of each key of `bypassed` read its value instead."""
    needed = _needed_nodes(block, {})
    removed = needed - _needed_nodes(block, bypassed)
    # Nothing reads an assert: it goes with what it checks.
    return removed | {n for n in block.nodes if n not in needed and not removed.isdisjoint(n.all_input_nodes)}


def _needed_nodes(block: Region, bypassed: Mapping[Node, Node]) -> set[Node]:
    """Nodes of a block that what follows it depends on."""
    inside = set(block.nodes)
    needed = {_final(n, bypassed) for n in block.nodes if any(u not in inside for u in n.users)}
    for node in reversed(block.nodes):
        if node in needed:
            needed.update(_final(i, bypassed) for i in node.all_input_nodes)
    return needed & inside


def _final(node: Node, bypassed: Mapping[Node, Node]) -> Node:
    while node in bypassed:
        node = bypassed[node]
    return node


def _names_read(graph: Graph, nodes: Iterable[Node]) -> dict[str, tuple[str, ...]]:
    """Paths of the leaves that nodes call, with names of their tensors, and names of parameters and buffers that nodes read."""
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        module = leaf(graph, node)
        if module is not None:
            found[str(node.target)] = tuple(f"{node.target}.{n}" for n in module.state_dict())
        elif node.op == "get_attr":
            found.setdefault(str(node.target), ())
    return found


def _unread(edit: Editor, name: str, tensors: tuple[str, ...]) -> tuple[str, ...]:
    """Of a leaf with its tensors, or of a tensor, what no node uses. A weight that a mix reads keeps the leaf that holds it."""
    if edit.calls(name) or edit.reads(name) or any(map(edit.calls, lineage(owner(name)))):
        return ()
    unread = tuple(t for t in tensors if not edit.reads(t))
    return (name, *unread) if len(unread) == len(tensors) else unread


def _make_partial(edit: Editor, conv: Node, bypassed: dict[Node, Node]) -> tuple[int, frozenset[str]]:
    """Makes a plain unit's convolution work on its first channels only: `x + pad(norm(conv(x[:, :width])))`.

    The unit's norm, if any, is narrowed to these channels. The caller replaces the convolution's weights.
    """
    x, shape = _input(conv), conv.meta["val"].shape
    width = math.ceil(shape[1] / PARTIAL)
    end, narrowed = conv, frozenset[str]()
    user = next(iter(conv.users)) if len(conv.users) == 1 else conv
    norm = leaf(edit.graph, user)
    if isinstance(norm, _BatchNorm):
        end, norm = user, _narrowed(norm, width)
        edit.replace_leaf(end, norm)
        narrowed = frozenset(f"{end.target}.{k}" for k, v in norm.state_dict().items() if v.ndim)
    head = edit.call(operator.getitem, (x, (slice(None), slice(None, width))), before=conv)
    edit.set_call(conv, args=(head,), kwargs={})
    for node in {conv, end}:
        node.meta["val"] = node.meta["val"][:, :width]
    readers = tuple(end.users)
    padded = edit.call(F.pad, (end, (0, 0) * (len(shape) - 2) + (0, shape[1] - width)), after=end, like=conv)
    bypassed[end] = edit.call(operator.add, (x, padded), after=padded)
    edit.redirect(end, bypassed[end], readers)
    return width, narrowed


def _narrowed(norm: _BatchNorm, width: int) -> _BatchNorm:
    norm = copy.deepcopy(norm)
    norm.num_features = width
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            norm._parameters[name] = nn.Parameter(parameter.detach()[:width].clone(), parameter.requires_grad)
    for name, buffer in norm._buffers.items():
        if buffer is not None and buffer.ndim:
            norm._buffers[name] = buffer[:width].clone()
    return norm
