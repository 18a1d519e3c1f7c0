"""Bypass: blocks whose residual branches are left out, for good or at random."""

import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.fx import Node
from torchvision.ops import StochasticDepth

from graphopt import Editor, Graph, PassError, Region
from graphopt.compiler.pass_base import Diagnostics
from graphopt.ir.nodes import attribute, leaf, overwriter, parameter_readers
from graphopt.ir.patterns import VIEWS, NotResidualError, Residual, residuals
from graphopt.runtime.body import StochasticBranch

Found = TypeVar("Found")

_MULTIPLICATIONS = (operator.mul, torch.mul, "mul")
_AFFINE = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KEEP_ZEROS = (nn.Identity, nn.modules.dropout._DropoutNd)
#: the same by class name, for layers of timm and torchvision; `ByMode` is a dropout function that was called by mode
_KEEP_ZEROS_NAMES = ("DropPath", "StochasticDepth", "ByMode")


class Removal(NamedTuple):
    """What leaving a block's branches out for good comes to.

    Attributes:
        residuals: the sums, in execution order.
        zeros: names of parameters that make the branches compute zeros when they are zero.
    """

    residuals: tuple[Residual, ...]
    zeros: tuple[str, ...]


def find_each(find: Callable[[Graph, Region], Found], blocks: Iterable[Region], graph: Graph, out: Diagnostics) -> dict[str, Found]:
    """What `find` (`residuals` or `removal`) gives for each block, by its name; blocks without are reported as skipped."""
    found = {}
    for block in blocks:
        try:
            found[block.name] = find(graph, block)
        except NotResidualError as reason:
            out.skip(block.name, str(reason))
    return found


def removal(graph: Graph, block: Region) -> Removal:
    """How to leave a block's branches out for good, so that the exported backbone, which still has them, computes the same.

    Raises:
        NotResidualError: the block has no branches that can be left out, or the backbone could not express that.
    """
    sums = residuals(graph, block)
    zeros = tuple(name for residual in sums for name in _last_weights(graph, residual))
    inside = set(block.nodes)
    readers = parameter_readers(graph)
    shared = next((name for name in zeros if not inside.issuperset(readers[id(graph.module.get_parameter(name))])), None)
    if shared is not None:
        raise NotResidualError(f"its branch ends in {shared}, which is used outside the block too: an export could not set it to zero")
    return Removal(sums, zeros)


def _last_weights(graph: Graph, residual: Residual) -> tuple[str, ...]:
    """Names of the parameters that make a branch compute zeros when they are zero."""
    node = residual.branch
    while node in residual.nodes:
        if names := _scale(graph, node):
            return names
        if not _keeps_zeros(graph, node) or len(node.all_input_nodes) != 1:
            break
        node = node.all_input_nodes[0]
    raise NotResidualError("its branch does not end in weights: an export could not leave it out")


def _scale(graph: Graph, node: Node) -> tuple[str, ...]:
    """Parameters of a node whose output is zero when they are: an affine layer's, a scale's."""
    module = leaf(graph, node)
    if isinstance(module, _AFFINE) and module.weight is not None:
        return tuple(f"{node.target}.{name}" for name, _ in module.named_parameters(recurse=False))
    if module is not None:
        return (f"{node.target}.gamma",) if isinstance(getattr(module, "gamma", None), nn.Parameter) else ()
    factors = node.all_input_nodes if node.target in _MULTIPLICATIONS else ()
    return next(((name,) for f in factors if (name := _parameter_behind(graph, f))), ())


def _parameter_behind(graph: Graph, node: Node) -> str | None:
    """The parameter that a node is only a view of."""
    while node.op == "call_method" and node.target in VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    is_parameter = node.op == "get_attr" and isinstance(attribute(graph.module, str(node.target)), nn.Parameter)
    return str(node.target) if is_parameter else None


def _keeps_zeros(graph: Graph, node: Node) -> bool:
    module = leaf(graph, node)
    if module is not None:
        return isinstance(module, _KEEP_ZEROS) or type(module).__name__ in _KEEP_ZEROS_NAMES
    return node.op == "call_method" and node.target in (*VIEWS, "permute", "transpose")


def remove(edit: Editor, residual: Residual) -> None:
    """Leaves a branch out: its sum becomes its shortcut.

    Where something writes into either in place (the ReLU of a ResNet's block), the sum becomes a copy of the shortcut, because what
    computed the shortcut may have saved it for the backward pass.
    """
    written = (overwriter(edit.graph, node) for node in (residual.sum, residual.shortcut))
    if any(node not in (None, residual.sum) for node in written):
        edit.set_call(residual.sum, torch.clone, (residual.shortcut,), {})
        edit.erase(residual.nodes)
    else:
        edit.redirect(residual.sum, residual.shortcut)
        edit.erase((residual.sum, *residual.nodes))


def skip_at_random(edit: Editor, block: str, residual: Residual, probability: float) -> None:
    """Leaves a branch out of a training step with a probability.

    Raises:
        PassError: sections of an earlier pass divide the branch.
    """
    shape = tuple(residual.shortcut.meta["val"].shape[1:])
    wrap = partial(StochasticBranch, probability=probability, shape=shape, key=residual.sum.name)
    if len(edit.outline(residual.nodes, wrap, f"bypass_{block.replace('.', '_')}")) != 1:
        what = "an earlier pass divides the block's branch, so it cannot be skipped as a whole"
        raise PassError(what, where=block, fix="Let drop come before that pass, or select other blocks")


def skip_samples(edit: Editor, path: str, residual: Residual, probability: float) -> None:
    """Leaves a branch out for each sample of a training step by itself, by a new leaf at `path`; the others are scaled to the same mean."""
    skipped = edit.call_module(path, StochasticDepth(probability, "row"), (residual.branch,), after=residual.branch)
    edit.redirect(residual.branch, skipped, (residual.sum,))
