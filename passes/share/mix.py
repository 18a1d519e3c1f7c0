"""Mixed weights as nodes: `w = a * w_before + b * w_after`, computed in the graph in place of a block's own, which are no longer stored.

Convolutions and linear layers become function calls with the mixed weight as an argument; the reads of a parameter that the graph reads
itself are replaced; any other leaf keeps its class and receives its weights as an input (`WithWeights`).
"""

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node

from graphopt import Editor, Graph, PassError
from graphopt.ir.paths import is_below, owner
from graphopt.passes.share.neighbours import MixedTensor, SharedBlock
from graphopt.passes.share.surrogate import inside, leaves_of

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def mix(before: Tensor, after: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a * before + b * after`: equation 1 of Replacement Learning (arXiv 2410.01239). a, b: shape ()."""
    return a * before + b * after


def scale(source: Tensor, a: Tensor) -> Tensor:
    """`a * source`: a mix with one source only."""
    return a * source


def mixed(sources: Sequence[Any], scalars: Sequence[Any]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """The function that mixes so many sources, and its arguments."""
    return (mix if len(sources) == 2 else scale), (*sources, *scalars)


class WithWeights(nn.Module):
    """A leaf that receives the weights it used to own: `forward(weights, *args, **kwargs)`. It keeps its buffers.

    Args:
        leaf: its submodules have no buffers. names: of its parameters, in the order of `weights`.
    """

    leaf: Any

    def __init__(self, leaf: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        # Not registered: its parameters no longer exist, and those on the meta device only stand for the ones it is called with.
        self.__dict__["leaf"] = copy.deepcopy(leaf).to("meta")
        self._buffers = self.leaf._buffers = leaf._buffers
        self.names = names
        self.training = leaf.training

    def forward(self, weights: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        if self.leaf.training != self.training:
            self.leaf.train(self.training)
        return functional_call(self.leaf, dict(zip(self.names, weights, strict=True)), args, kwargs)

    def extra_repr(self) -> str:
        return type(self.leaf).__name__


@dataclass(frozen=True)
class Mixture:
    """A tensor that is computed now, with the names of its scalars in the order of its sources."""

    tensor: MixedTensor
    scalars: tuple[str, ...]


def replace_weights(
    edit: Editor, block: SharedBlock, *, init: tuple[float, float], per_tensor: bool, detach: bool, channels: int | None = None
) -> tuple[Mixture, ...]:
    """Replaces a block's tensors by mixes of its neighbours', and deletes them.

    Args:
        init: initial `a` and `b`. per_tensor: one pair of scalars per tensor instead of one per block.
        detach: stop gradients from the mixes into their sources.
        channels: mix only so many of the sources' first channels, in and out; default: all.

    Raises:
        PassError: a source or the block's own tensors are no longer there, because an earlier pass replaced them.
    """
    graph, names = edit.graph, {t.name for t in block.tensors}
    leaves = {path: graph.module.get_submodule(path) for path in leaves_of(names, edit.calls)}
    readers = sorted(node for found in (*map(edit.reads, names), *map(edit.calls, leaves)) for node in found)
    _check_still_there(graph, block, readers)
    own = [graph.module.get_parameter(n) for n in names]
    parameters = {path: tuple(n for n, _ in leaf.named_parameters()) for path, leaf in leaves.items()}
    for path, leaf in leaves.items():
        if _function_of(graph, path) is not None:
            edit.remove([path])
        else:
            edit.replace_leaf(edit.calls(path)[0], WithWeights(leaf, parameters[path]))
    edit.remove(sorted(n for n in names if not is_below(n, leaves)))
    mixtures = _add_scalars(edit, block, init, per_tensor, own[0].device, any(p.requires_grad for p in own))
    scalars: dict[str, Node] = {}
    values: dict[str, Node] = {}
    for mixture in mixtures:
        reader = next(n for n in readers if is_below(mixture.tensor.name, [str(n.target)]))
        scalars |= {name: edit.read(name, before=readers[0]) for name in mixture.scalars if name not in scalars}
        sources = [_read_source(edit, name, reader, detach, channels) for name in mixture.tensor.sources]
        values[mixture.tensor.name] = edit.call(*mixed(sources, [scalars[n] for n in mixture.scalars]), before=reader)
    for node in readers:
        path = str(node.target)
        if node.op == "get_attr":
            edit.redirect(node, values[path])
            edit.erase([node])
        else:
            _pass_weights(edit, node, leaves[path], {n: values[f"{path}.{n}"] for n in parameters[path]})
    return mixtures


def _check_still_there(graph: Graph, block: SharedBlock, readers: Sequence[Node]) -> None:
    if not readers or any(parameter_at(graph, t.name) is None for t in block.tensors):
        raise PassError("an earlier pass has replaced or removed what it would share", where=block.region, fix="Put this pass first")
    gone = next((s for t in block.tensors for s in t.sources if parameter_at(graph, s) is None), None)
    if gone is not None:
        fix = "Share in one pass, or select blocks that do not touch"
        raise PassError(f"it needs {gone}, which an earlier pass has replaced", where=block.region, fix=fix)


def parameter_at(graph: Graph, name: str) -> nn.Parameter | None:
    """The parameter of that name; None where there is none."""
    try:
        return graph.module.get_parameter(name)
    except AttributeError:
        return None


def _is_taken(graph: Graph, name: str) -> bool:
    """Whether a module, a parameter or a buffer has this name."""
    try:
        holder = graph.module.get_submodule(owner(name))
    except AttributeError:
        return False
    return any(name.rpartition(".")[2] in registry for registry in (holder._modules, holder._parameters, holder._buffers))


def _add_scalars(
    edit: Editor, block: SharedBlock, init: tuple[float, float], per_tensor: bool, device: torch.device, trainable: bool
) -> tuple[Mixture, ...]:
    """Registers a block's scalars: one pair, or one per tensor; float32, of shape ()."""
    names = (f"{block.paths[0]}.share{suffix}" for suffix in chain([""], (f"_{number}" for number in count(2))))
    root = next(name for name in names if not _is_taken(edit.graph, name))
    starts = {"a": init[0], "b": init[1]}
    if block.before is None or block.after is None:
        # A single source gets the weight of both, so that the mix keeps its size.
        starts = {"b" if block.before is None else "a": sum(init)}

    def pair(path: str) -> tuple[str, ...]:
        for letter, start in starts.items():
            value = torch.full((), start, dtype=torch.float32, device=device)
            edit.add_parameter(f"{path}.{letter}", nn.Parameter(value, requires_grad=trainable))
        return tuple(f"{path}.{letter}" for letter in starts)

    if not per_tensor:
        scalars = pair(root)
        return tuple(Mixture(tensor, scalars) for tensor in block.tensors)
    # A tensor's name inside its block becomes the name of one module.
    return tuple(Mixture(t, pair(f"{root}.{inside(t.name, block.paths).replace('.', '_')}")) for t in block.tensors)


def _read_source(edit: Editor, name: str, reader: Node, detach: bool, channels: int | None) -> Node:
    """Reads what a mix is made of, right before the first node that needs the mix."""
    source = edit.read(name, before=reader)
    if detach:
        source = edit.call("detach", (source,), before=reader)
    if channels is not None:
        first = slice(None, channels)
        source = edit.call(operator.getitem, (source, (first, first) if name.endswith("weight") else first), before=reader)
    return source


def _function_of(graph: Graph, path: str) -> Callable[..., Tensor] | None:
    """The function with a leaf's computation and its weights as arguments, by the class that the backbone has there."""
    kind = type(graph.untouched.module.get_submodule(path))
    return F.linear if kind is nn.Linear else _CONVOLUTIONS.get(kind)


def _pass_weights(edit: Editor, node: Node, leaf: Any, weights: dict[str, Node]) -> None:
    """Lets a call compute with weights that are nodes."""
    function = _function_of(edit.graph, str(node.target))
    if function is None:
        edit.set_call(node, args=(tuple(weights.values()), *node.args))
        return
    x: Any = node.args[0] if node.args else node.kwargs["input"]
    operands = (weights["weight"], weights.get("bias"))
    if function is F.linear:
        edit.set_call(node, function, (x, *operands), {})
        return
    padding = leaf.padding
    if leaf.padding_mode != "zeros":
        x = edit.call(F.pad, (x, tuple(leaf._reversed_padding_repeated_twice)), {"mode": leaf.padding_mode}, before=node)
        padding = (0,) * len(leaf.kernel_size)
    edit.set_call(node, function, (x, *operands, leaf.stride, padding, leaf.dilation, leaf.groups), {})


def compute_mixtures(state: dict[str, Tensor], mixtures: Iterable[Mixture]) -> dict[str, Tensor]:
    """A state dict under the backbone's keys: mixes computed, scalars left out."""
    state, scalars = dict(state), set[str]()
    for mixture in mixtures:
        function, values = mixed([state[n] for n in mixture.tensor.sources], [state[n] for n in mixture.scalars])
        state[mixture.tensor.name] = function(*values)
        scalars.update(mixture.scalars)
    return {k: v for k, v in state.items() if k not in scalars}


#: largest relative distance between a tensor and its best mix at which the tensor counts as a mix
_TOLERANCE = 1e-3


def fit_mixtures(state: dict[str, Tensor], mixtures: Iterable[Mixture]) -> dict[str, Tensor]:
    """A checkpoint of the backbone under the rewritten keys.

    Where a block's tensors are mixes of its neighbours' (the checkpoint was exported from such a plan), the scalars are recovered by
    least squares. From any other checkpoint the block's own weights are left out, and the scalars keep their values.
    """
    state = dict(state)
    groups: dict[tuple[str, ...], list[MixedTensor]] = {}
    for mixture in mixtures:
        groups.setdefault(mixture.scalars, []).append(mixture.tensor)
    for scalars, tensors in groups.items():
        fitted = _fit(state, tensors)
        if fitted is not None:
            state |= {name: value.to(torch.float32) for name, value in zip(scalars, fitted, strict=True)}
        for tensor in tensors:
            state.pop(tensor.name, None)
    return state


def _fit(state: dict[str, Tensor], tensors: list[MixedTensor]) -> Tensor | None:
    """The scalars whose mixes come closest to the tensors; None where even those do not reach them."""
    if any(n not in state for t in tensors for n in (t.name, *t.sources)):
        return None

    def joined(names: Iterable[str]) -> Tensor:
        return torch.cat([state[n].double().flatten() for n in names])

    target = joined(t.name for t in tensors).unsqueeze(1)
    columns = torch.stack([joined(names) for names in zip(*(t.sources for t in tensors), strict=True)], dim=1)
    fitted = torch.linalg.lstsq(columns, target).solution
    distance = (columns @ fitted - target).norm() / target.norm().clamp_min(1e-30)
    return fitted.flatten() if bool(distance < _TOLERANCE) and bool(fitted.isfinite().all()) else None
