"""Passes that do one thing each, as a third party would write them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from graphopt import ActiveMatch, Editor, Effects, Match, Status
from graphopt.compiler.pass_base import FeatureCut, RuntimeNeeds
from graphopt.ir.blocks import find_blocks
from graphopt.ir.select import select
from graphopt.runtime.body import Body


class _Selecting(graphopt.Pass):
    select: graphopt.Selector

    def match(self, graph: graphopt.Graph) -> Match[None]:
        return Match(select(self.select, graph))


class Ice(_Selecting):
    """Parameters stop training; the pass declares nothing, and warns."""

    name: ClassVar[str] = "ice"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        edit.freeze(name for region in match.regions for name in region.parameters)
        effects = Effects()
        effects.warn(match.regions[0].name, "cold <b>here</b>")
        return effects


class Blend(_Selecting):
    """Every convolution's weight becomes a mix of the same convolution's in the blocks before and after."""

    name: ClassVar[str] = "blend"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        graph = edit.graph
        blocks = [b.name for b in find_blocks(graph)]
        for region in match.regions:
            index = blocks.index(region.name)
            sources = (blocks[index - 1], blocks[index + 1])
            edit.add_parameter(f"{region.name}.a", nn.Parameter(graph.module.get_parameter(region.parameters[0]).new_tensor(0.25)))
            for node in [n for n in region.nodes if n.op == "call_module" and str(n.target).endswith(("conv1", "conv2"))]:
                leaf = str(node.target).rpartition(".")[2]
                scale = edit.read(f"{region.name}.a", before=node)
                one, other = (edit.read(f"{source}.{leaf}.weight", before=node) for source in sources)
                mixed = edit.call(torch_add, (edit.call(torch_mul, (scale, one), before=node), other), before=node)
                edit.redirect(node, edit.call(F.conv2d, (node.args[0], mixed), {"padding": 1}, before=node))
                edit.erase([node])
            effects.mark(region.name, Status.SHARED, sources=sources, a=0.25)
        return effects


def torch_mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def torch_add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


class Skip(_Selecting):
    """A block is left out: what goes in comes out."""

    name: ClassVar[str] = "skip"
    declare: bool = True

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        for region in match.regions:
            inside = set(region.nodes)
            edit.redirect(region.exits[0], region.entries[0], [u for u in region.exits[0].users if u not in inside])
            edit.erase(region.nodes)
            if self.declare:
                effects.mark(region.name, Status.BYPASSED)
        return effects


class _Local(nn.Module):
    def __init__(self, body: fx.GraphModule, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = Body(body), Body(head)  # type: ignore[arg-type]  # any module will do here

    def forward(self, target: Any, *inputs: Any) -> Any:
        x = self.body(*(i.detach() if isinstance(i, Tensor) and i.is_floating_point() and not i.is_leaf else i for i in inputs))
        return (x, F.cross_entropy(self.head(x.mean((2, 3))), target)) if self.training else (x, None)


class Part(_Selecting):
    """Everything up to a block becomes a module with a loss of its own, computed by a new head."""

    name: ClassVar[str] = "part"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        last, order = match.regions[-1], edit.graph.order
        nodes = [n for n in edit.graph.nodes if order[n] <= order[last.exits[0]] and n.op != "placeholder"]
        head = nn.Linear(8, 10)
        edit.add_module("aux.0", head)
        edit.outline(nodes, lambda body: _Local(body, head), "first", target=True)
        effects = Effects(needs=RuntimeNeeds(targets=True))
        effects.mark("aux.0", Status.INSERTED, sources=(last.name,))
        return effects


class Adapter(_Selecting):
    """A new layer behind a block, declared by nobody."""

    name: ClassVar[str] = "adapter"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        for region in match.regions:
            node = region.exits[0]
            edit.redirect(node, edit.call_module("adapter", nn.Conv2d(8, 8, 1), (node,), after=node))
        return Effects()


class Store(_Selecting):
    """What comes out of a block is cached: training starts there."""

    name: ClassVar[str] = "store"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        node = match.regions[-1].exits[0]
        return Effects(needs=RuntimeNeeds(features=FeatureCut(node, match.regions[-1].name)))


class Say(_Selecting):
    """Changes nothing and declares a status."""

    name: ClassVar[str] = "say"
    status: Status
    detail: dict[str, str] = {}

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        for name in match.names:
            effects.mark(name, self.status, **self.detail)
        return effects


class Before(_Selecting):
    """An operation before a region, which the pass declares."""

    name: ClassVar[str] = "before"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        for region in match.regions:
            for entry in region.entries:
                edit.redirect(entry, edit.call(torch.relu, (entry,), after=entry), region.nodes)
            effects.mark(region.name, Status.REWIRED)
        return effects
