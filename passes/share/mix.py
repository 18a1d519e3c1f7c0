"""Mixed weights as nodes: `w = a * w_before + b * w_after`, put in the place of a block's own, which are then no longer stored.

Convolutions and linear layers become function calls with the mixed weight as an argument; a tensor that the graph reads itself is simply
replaced; any other leaf keeps its class and is handed its weights (`WithWeights`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute
from graphopt.ir.shapes import as_fake
from graphopt.passes.share.neighbours import Blend, Sharing
from graphopt.passes.share.parts import is_batch_norm, leaves_of

_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {"Conv1d": F.conv1d, "Conv2d": F.conv2d, "Conv3d": F.conv3d}


def mix(before: Tensor, after: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a * before + b * after`: equation 1 of Replacement Learning (arXiv 2410.01239). a, b: shape ()."""
    return a * before + b * after


def scale(source: Tensor, a: Tensor) -> Tensor:
    """`a * source`: a mix with one side only."""
    return a * source


class WithWeights(nn.Module):
    """A leaf that is handed the weights it used to own: `forward(weights, *args, **kwargs)`.

    Args:
        leaf: without buffers. names: of its parameters, in the order in which `weights` come.
    """

    def __init__(self, leaf: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        # Held outside the registry: what it would register no longer exists, and its own tensors are stand-ins without memory.
        self.__dict__["leaf"] = copy.deepcopy(leaf).to("meta")
        self.names = names
        self.training = leaf.training

    def forward(self, weights: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        if self.leaf.training != self.training:
            self.leaf.train(self.training)
        return functional_call(self.leaf, dict(zip(self.names, weights, strict=True)), args, kwargs, strict=True)

    def extra_repr(self) -> str:
        return type(self.leaf).__name__


class BatchNormWithWeights(nn.modules.batchnorm._BatchNorm):
    """A batch norm with statistics of its own that is handed weight and bias, each (C,)."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=norm.track_running_stats)
        self._buffers = norm._buffers
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        return None

    def forward(self, weights: tuple[Tensor, Tensor], input: Tensor) -> Tensor:  # type: ignore[override]
        factor = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        statistics = (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None, None)
        return F.batch_norm(input, *statistics, *weights, by_batch, factor, self.eps)


# -- rewriting ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mixed:
    """One tensor after the rewrite: what it is a mix of, and the names of its scalars (None: nothing on that side)."""

    blend: Blend
    a: str | None
    b: str | None

    @property
    def scalars(self) -> tuple[str, ...]:
        return tuple(n for n in (self.a, self.b) if n is not None)


@dataclass(frozen=True)
class Manner:
    """How to mix: initial `a` and `b`, one pair per block or per tensor, gradients into the sources or not, and the pass's name."""

    init: tuple[float, float]
    per_parameter: bool
    detach: bool
    by: str


def give_up_weights(
    graph: Graph, sharing: Sharing, manner: Manner, slices: Callable[[fx.Node, str], fx.Node] | None = None
) -> tuple[Mixed, ...]:
    """Replaces a region's tensors by mixes of its neighbours', and deletes them.

    Args:
        slices: applied to every source before it is mixed (a surrogate may use a part of it).

    Raises:
        PassError: a source is no longer there, because an earlier pass replaced it.
    """
    for blend in sharing.blends:
        for source in (blend.before, blend.after):
            if source is not None and not _has(graph, source):
                raise PassError(
                    f"it would live on {source}, which an earlier pass has replaced",
                    where=sharing.region,
                    fix="Share in one pass, or select blocks that do not touch",
                )
    chosen = {blend.own for blend in sharing.blends}
    frozen = not any(graph.module.get_parameter(n).requires_grad for n in chosen)
    leaves = leaves_of(graph, chosen)
    readers = [n for n in graph.nodes if (n.op == "get_attr" and n.target in chosen) or (n.op == "call_module" and n.target in leaves)]
    if not readers:
        raise PassError("nothing of it is left to share: an earlier pass has taken it out", where=sharing.region)
    classes = {path: graph.types.get(path, type(graph.module.get_submodule(path)).__name__) for path in leaves}
    stock = {path: graph.module.get_submodule(path) for path in leaves}
    names = {path: tuple(n for n, _ in leaf.named_parameters()) for path, leaf in stock.items()}
    like = graph.module.get_parameter(sharing.blends[0].own)
    for path in leaves:
        _take_leaf_away(graph, path, stock[path], classes[path], names[path])
    for name in chosen:
        if _has(graph, name):
            path, _, last = name.rpartition(".")
            del graph.module.get_submodule(path)._parameters[last]
    mixed = _register_scalars(graph, sharing, manner, like, frozen)
    values: dict[str, fx.Node] = {}
    scalars: dict[str, fx.Node] = {}
    for item in mixed:
        first = next(n for n in readers if n.target == item.blend.own or (n.op == "call_module" and _below(item.blend.own, str(n.target))))
        values[item.blend.own] = _value(graph, item, first, scalars, readers[0], manner, slices)
    for node in readers:
        if node.op == "get_attr":
            node.replace_all_uses_with(values[str(node.target)])
            graph.fx.erase_node(node)
        else:
            path = str(node.target)
            given = {n: values[f"{path}.{n}"] for n in names[path]}
            _call_with(graph, node, stock[path], classes[path], given, manner.by)
    return mixed


def _value(
    graph: Graph,
    item: Mixed,
    reader: fx.Node,
    scalars: dict[str, fx.Node],
    earliest: fx.Node,
    manner: Manner,
    slices: Callable[[fx.Node, str], fx.Node] | None,
) -> fx.Node:
    """The nodes that work one tensor out, right before its first reader; scalars are read once per region."""
    new: list[fx.Node] = []
    for name in item.scalars:
        if name not in scalars:
            with graph.fx.inserting_before(earliest):
                scalars[name] = graph.fx.get_attr(name)
            stamp(graph, [scalars[name]], earliest, manner.by)
    with graph.fx.inserting_before(reader):
        sources = []
        for name in (item.blend.before, item.blend.after):
            if name is None:
                continue
            source = graph.fx.get_attr(name)
            new.append(source)
            if manner.detach:
                source = graph.fx.call_method("detach", (source,))
                new.append(source)
            if slices is not None:
                source = slices(source, item.blend.own)
                new.append(source)
            sources.append(source)
        value = graph.fx.call_function(mix if len(sources) == 2 else scale, (*sources, *(scalars[n] for n in item.scalars)))
        new.append(value)
    stamp(graph, new, reader, manner.by)
    return value


def stamp(graph: Graph, nodes: Iterable[fx.Node], old: fx.Node, by: str) -> None:
    """New nodes that do an old one's work come from where it came from, and belong to the sections it belongs to."""
    nodes = tuple(nodes)
    for node in nodes:
        node.meta["origin"], node.meta["by"] = old.meta["origin"], by
        if node.op in ("call_function", "call_method"):
            node.meta["val"] = _shape_of(graph, node)
    graph.sections[:] = [replace(s, nodes=(*s.nodes, *nodes)) if old in s.nodes else s for s in graph.sections]


def _shape_of(graph: Graph, node: fx.Node) -> Any:
    """What a new node gives, on fake tensors: later blocks of this very rewrite want to see shapes."""
    mode = graph.placeholder.meta["val"].fake_mode

    def value(argument: fx.Node) -> Any:
        if argument.op == "get_attr":
            return as_fake(attribute(graph.module, str(argument.target)), mode)
        return argument.meta["val"]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _register_scalars(graph: Graph, sharing: Sharing, manner: Manner, like: Tensor, frozen: bool) -> tuple[Mixed, ...]:
    root, home = graph.module, sharing.paths[0]
    parent, _, last = home.rpartition(".")
    if last not in root.get_submodule(parent)._modules:
        root.get_submodule(parent).add_module(last, nn.Module())
    block = root.get_submodule(home)
    name, number = "share", 1
    while hasattr(block, name):
        number += 1
        name = f"share_{number}"
    holder = nn.Module()
    block.add_module(name, holder)
    two = sharing.before is not None and sharing.after is not None
    # A single source takes the weight of both, so that the mix keeps its size.
    starts = manner.init if two else (sum(manner.init),) * 2

    def register(place: nn.Module, path: str) -> tuple[str | None, str | None]:
        found: list[str | None] = []
        for letter, value, source in zip("ab", starts, (sharing.before, sharing.after), strict=True):
            if source is None:
                found.append(None)
                continue
            place.register_parameter(
                letter, nn.Parameter(torch.full((), value, dtype=torch.float32, device=like.device), requires_grad=not frozen)
            )
            found.append(f"{path}.{letter}")
        return found[0], found[1]

    if not manner.per_parameter:
        pair = register(holder, f"{home}.{name}")
        return tuple(Mixed(blend, *pair) for blend in sharing.blends)
    mixed = []
    for blend in sharing.blends:
        inside = next((blend.own[len(p) + 1 :] for p in sharing.paths if blend.own.startswith(f"{p}.")), blend.own).replace(".", "_")
        holder.add_module(inside, nn.Module())
        mixed.append(Mixed(blend, *register(holder.get_submodule(inside), f"{home}.{name}.{inside}")))
    return tuple(mixed)


def _take_leaf_away(graph: Graph, path: str, leaf: nn.Module, kind: str, names: tuple[str, ...]) -> None:
    if kind in _CONVOLUTIONS or kind == "Linear":
        parent, _, last = path.rpartition(".")
        del graph.module.get_submodule(parent)._modules[last]
    elif is_batch_norm(leaf):
        graph.replace_module(path, BatchNormWithWeights(leaf))  # type: ignore[arg-type]
    else:
        graph.replace_module(path, WithWeights(leaf, names))


def _call_with(graph: Graph, node: fx.Node, leaf: Any, kind: str, weights: dict[str, fx.Node], by: str) -> None:
    """Puts the leaf's computation, with its weights handed in, in the place of its call."""
    new: list[fx.Node] = []
    with graph.fx.inserting_before(node):
        if kind in _CONVOLUTIONS or kind == "Linear":
            x = node.args[0] if node.args else node.kwargs["input"]
            weight, bias = weights["weight"], weights.get("bias")
            if kind == "Linear":
                new.append(graph.fx.call_function(F.linear, (x, weight, bias)))
            else:
                padding = leaf.padding
                if leaf.padding_mode != "zeros":
                    x = graph.fx.call_function(F.pad, (x, tuple(leaf._reversed_padding_repeated_twice)), {"mode": leaf.padding_mode})
                    new.append(x)
                    padding = (0,) * len(leaf.kernel_size)
                rest = (leaf.stride, padding, leaf.dilation, leaf.groups)
                new.append(graph.fx.call_function(_CONVOLUTIONS[kind], (x, weight, bias, *rest)))
        else:
            new.append(graph.fx.call_module(str(node.target), (tuple(weights.values()), *node.args), node.kwargs))
    stamp(graph, new, node, by)
    new[-1].meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new[-1])
    graph.fx.erase_node(node)


def _below(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def _has(graph: Graph, name: str) -> bool:
    try:
        graph.module.get_parameter(name)
    except AttributeError:
        return False
    return True


# -- checkpoints ----------------------------------------------------------------------------------------------------------------
def materialise(state: dict[str, Tensor], mixed: Iterable[Mixed]) -> dict[str, Tensor]:
    """A state dict under the backbone's keys: mixes worked out, scalars gone."""
    state = dict(state)
    gone: set[str] = set()
    for item in mixed:
        values = [state[n] for n in (item.blend.before, item.blend.after, *item.scalars) if n is not None]
        state[item.blend.own] = mix(*values) if len(values) == 4 else scale(*values)
        gone.update(item.scalars)
    return {k: v for k, v in state.items() if k not in gone}


#: largest relative distance of a tensor from what its neighbours can express, for its scalars to be worked out from it
_RECOGNISED = 1e-3


def recognise(state: dict[str, Tensor], mixed: Iterable[Mixed]) -> dict[str, Tensor]:
    """A checkpoint of the backbone under the rewritten keys.

    Where its tensors *are* a mix of their neighbours' (it was exported from one) the scalars come back, by least squares; in any
    other checkpoint the block's own weights are given up, and the scalars keep the values they have.
    """
    state = dict(state)
    groups: dict[tuple[str, ...], list[Mixed]] = {}
    for item in mixed:
        groups.setdefault(item.scalars, []).append(item)
    for scalars, items in groups.items():
        found = _fitted(state, items, len(scalars))
        if found is not None:
            state |= {name: value.to(torch.float32) for name, value in zip(scalars, found, strict=True)}
        for item in items:
            state.pop(item.blend.own, None)
    return state


def _fitted(state: dict[str, Tensor], items: list[Mixed], count: int) -> Tensor | None:
    if any(n not in state for item in items for n in (item.blend.own, item.blend.before, item.blend.after) if n is not None):
        return None
    target = torch.cat([state[i.blend.own].double().flatten() for i in items])
    sides = [[n for n in (i.blend.before, i.blend.after) if n is not None] for i in items]
    columns = torch.stack([torch.cat([state[s[k]].double().flatten() for s in sides]) for k in range(count)], dim=1)
    found = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution
    distance = (columns @ found - target.unsqueeze(1)).norm() / target.norm().clamp_min(1e-30)
    return found.flatten() if bool(distance < _RECOGNISED) and bool(found.isfinite().all()) else None
