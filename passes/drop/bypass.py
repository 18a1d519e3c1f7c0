"""Bypass: residual branches that a block can do without, for good or at random.

A block here is one tensor in, one of the same shape out, computed as one or more sums `trunk + branch`, with nothing but elementwise
activations after the last. ResNet's blocks have one such sum, transformer blocks two.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.ir.graph import Graph
from graphopt.ir.regions import Region
from graphopt.runtime.body import Body

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ACTIVATIONS = {F.relu, torch.relu, F.relu_, torch.relu_, F.gelu, F.silu, "relu", "relu_"}
_VIEWS = {"reshape", "view", "flatten", "contiguous"}


@dataclass(frozen=True)
class Residual:
    """One sum of a block: `sum = trunk + branch`; `nodes` compute the branch from the trunk."""

    sum: fx.Node
    trunk: fx.Node
    branch: fx.Node
    nodes: tuple[fx.Node, ...]


# -- finding ------------------------------------------------------------------------------------------------------------------------
def residuals(graph: Graph, region: Region) -> tuple[Residual, ...] | str:
    """The sums of a block in execution order, or the reason why it is no such block."""
    if not region.closed:
        return "it is not closed: more than one tensor goes in or comes out"
    entry, exit_ = region.entries[0], region.exits[0]
    went_in, came_out = _shape(entry), _shape(exit_)
    if went_in != came_out:
        return f"it is not shape-preserving: {went_in} goes in, {came_out} comes out"
    inside = set(region.nodes)
    found: list[Residual] = []
    trunk = entry
    while trunk is not exit_:
        here = trunk
        next_sum = next((n for n in region.nodes if n.op != "call_module" and n.target in _SUMS and _adds(n, here, inside, graph)), None)
        if next_sum is not None:
            branch = _other(next_sum, here, inside, graph)
            nodes = _between(here, branch, inside)
            if any(u not in set(nodes) and u is not next_sum for n in nodes for u in n.users):
                return f"its branch is used elsewhere than in {next_sum}"
            if _shape(branch) != _shape(here):
                return "its branch has another shape than its shortcut"
            found.append(Residual(next_sum, here, branch, nodes))
            trunk = next_sum
            continue
        users = [u for u in here.users if u in inside and isinstance(u.meta.get("val"), Tensor)]
        if len(users) == 1 and _goes_on(graph, users[0]):
            trunk = users[0]
            continue
        return "it has no identity shortcut around what it computes"
    return tuple(found) if found else "it has no identity shortcut around what it computes"


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[1:]) if isinstance(node.meta.get("val"), Tensor) else ()


def _is_nothing(graph: Graph, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.module.get_submodule(str(node.target)), nn.Identity)


def _goes_on(graph: Graph, node: fx.Node) -> bool:
    """Whether a node between two sums, or after the last, is only an activation or another view of the same."""
    if node.op == "call_module":
        return isinstance(graph.module.get_submodule(str(node.target)), nn.ReLU | nn.GELU | nn.SiLU | nn.Identity)
    return node.target in _ACTIVATIONS or (node.op == "call_method" and node.target in _VIEWS)


def _same(node: Any, trunk: fx.Node, inside: set[fx.Node], graph: Graph) -> bool:
    """Whether a summand is the trunk itself, seen through modules that do nothing."""
    while isinstance(node, fx.Node) and node is not trunk and node in inside and _is_nothing(graph, node):
        node = node.args[0]
    return node is trunk


def _adds(node: fx.Node, trunk: fx.Node, inside: set[fx.Node], graph: Graph) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    same = [_same(a, trunk, inside, graph) for a in node.args]
    other = node.args[0] if same[1] else node.args[1]
    return sum(same) == 1 and isinstance(other, fx.Node) and trunk in _sources(other, inside)


def _other(node: fx.Node, trunk: fx.Node, inside: set[fx.Node], graph: Graph) -> fx.Node:
    one, two = node.args
    return two if _same(one, trunk, inside, graph) else one  # type: ignore[return-value]


def _sources(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                if source in inside:
                    stack.append(source)
    return found


def _between(trunk: fx.Node, branch: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """What computes the branch, the trunk aside, in execution order."""
    found = {branch}
    stack = [branch]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not trunk and source in inside and source not in found:
                found.add(source)
                stack.append(source)
    # Numbers that nothing reads in the end (the rest of an unpacked shape) belong to it: they are no way out.
    for node in reversed(branch.graph.nodes):
        if node in inside and node not in found and any(i in found for i in node.all_input_nodes) and _leads_nowhere(node):
            found |= _descendants(node)
    return tuple(n for n in branch.graph.nodes if n in found)


def _leads_nowhere(node: fx.Node) -> bool:
    return node.op != "output" and all(_leads_nowhere(user) for user in node.users)


def _descendants(node: fx.Node) -> set[fx.Node]:
    return {node}.union(*(_descendants(user) for user in node.users))


# -- for good -----------------------------------------------------------------------------------------------------------------------
_ZEROED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_THROUGH = (nn.Identity, nn.modules.dropout._DropoutNd)


def last_affine(graph: Graph, residual: Residual) -> tuple[str, ...] | None:
    """State-dict names that make the branch compute zeros when they are zero; None where there are none such.

    So the backbone itself, exported, computes what the bypassed network does: its branches are still there and add nothing.
    """
    node = residual.branch
    while node in residual.nodes:
        if node.op == "call_module":
            path = str(node.target)
            module = graph.module.get_submodule(path)
            if isinstance(module, _ZEROED) and getattr(module, "weight", None) is not None:
                return tuple(f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                return (f"{path}.gamma",)
            if not isinstance(module, _THROUGH) and type(module).__name__ not in ("DropPath", "StochasticDepth", "ByMode"):
                return None
        elif node.target in (operator.mul, torch.mul, "mul"):
            scales = [found for a in node.args if isinstance(a, fx.Node) and (found := _parameter_behind(a))]
            return (scales[0],) if scales else None
        elif node.op != "call_method" or node.target not in (*_VIEWS, "permute", "transpose"):
            return None
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None


def _parameter_behind(node: fx.Node) -> str | None:
    """The parameter that a node is only another view of."""
    while node.op == "call_method" and node.target in _VIEWS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else None


def remove(graph: Graph, residual: Residual) -> None:
    """The sum becomes its trunk; what computed the branch is gone."""
    residual.sum.replace_all_uses_with(residual.trunk)
    graph.fx.erase_node(residual.sum)
    for node in reversed(residual.nodes):
        if not node.users:
            graph.fx.erase_node(node)


# -- at random ----------------------------------------------------------------------------------------------------------------------
class _Skip(torch.autograd.Function):
    """Zeros like the trunk; every parameter of the branch still gets a gradient, which is zero.

    So a step that skips a branch looks to the optimizer, and to DDP, like any other.
    """

    @staticmethod
    def forward(ctx: Any, trunk: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.zeros_like(trunk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(p) if needed else None for p, needed in wanted)


class StochasticBranch(nn.Module):
    """Runs a residual branch with probability `1 - probability` in training, and always in eval mode (stochastic depth, arXiv 1603.09382).

    The draw is one per batch, so that a skipped branch costs nothing. A branch that runs in training is divided by `1 - probability`: its
    expectation is then what eval mode adds, and the network that is exported needs no correction.
    """

    def __init__(self, body: fx.GraphModule, probability: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = Body(body)
        self.probability, self.shape = probability, shape

    def forward(self, *inputs: Tensor) -> Tensor:
        # A forecast runs on fake tensors: it counts the step in which every branch runs, which is also the one that needs most memory.
        if not self.training or any(isinstance(t, FakeTensor) for t in inputs):
            return self.body(*inputs)
        if torch.rand(()).item() < self.probability:
            # Besides the trunk come parameters that the root reads for the body.
            tensors = [t for t in inputs if isinstance(t, Tensor)]
            trunk = next(i for i, t in enumerate(tensors) if t.shape[1:] == self.shape)
            others = (t for i, t in enumerate(tensors) if i != trunk and t.requires_grad)
            return _Skip.apply(tensors[trunk], *others, *self.body.parameters())
        return self.body(*inputs) / (1 - self.probability)

    def extra_repr(self) -> str:
        return f"probability={self.probability:g}"
