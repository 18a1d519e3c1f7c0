"""Passes that do one thing each, as a third party would write them: the diff must tell what they did without knowing them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from graphopt.compiler.pass_base import Effects, FeatureCut, Mark, Match, Needs, Note
from graphopt.ir.blocks import find_blocks
from graphopt.ir.section import Section
from graphopt.ir.select import select
from graphopt.runtime.body import Body


class _Selecting(graphopt.Pass):
    select: graphopt.Selector

    def match(self, graph: graphopt.Graph) -> Match:
        return Match(select(self.select, graph))


class Ice(_Selecting):
    """Parameters stop training; nothing else, and no word about it."""

    use: ClassVar[str] = "ice"

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        for region in match.regions:
            for name in region.parameters:
                graph.module.get_parameter(name).requires_grad_(False)
        return Effects(tuple(r.name for r in match.regions), (Note("warn", match.regions[0].name, "cold <b>here</b>"),))


class Blend(_Selecting):
    """Every convolution's weight becomes a mix of the same convolution's in the blocks before and after."""

    use: ClassVar[str] = "blend"

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        blocks = [b.name for b in find_blocks(graph)]
        for region in match.regions:
            index = blocks.index(region.name)
            scalar = nn.Parameter(graph.module.get_parameter(region.parameters[0]).new_tensor(0.25))
            graph.module.get_submodule(region.name).register_parameter("a", scalar)
            for node in [n for n in region.nodes if n.op == "call_module" and n.target.endswith(("conv1", "conv2"))]:
                leaf = node.target.rpartition(".")[2]
                with graph.fx.inserting_before(node):
                    scale = graph.fx.get_attr(f"{region.name}.a")
                    one = graph.fx.get_attr(f"{blocks[index - 1]}.{leaf}.weight")
                    other = graph.fx.get_attr(f"{blocks[index + 1]}.{leaf}.weight")
                    first = graph.fx.call_function(torch_mul, (scale, one))
                    mixed = graph.fx.call_function(torch_add, (first, other))
                    done = graph.fx.call_function(F.conv2d, (node.args[0], mixed), {"padding": 1})
                for new in (scale, one, other, first, mixed, done):
                    new.meta.update(origin=node.meta["origin"], by=self.use)
                node.replace_all_uses_with(done)
                graph.fx.erase_node(node)
        return Effects(tuple(r.name for r in match.regions))


def torch_mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def torch_add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


class Skip(_Selecting):
    """A block is left out: what went in comes out."""

    use: ClassVar[str] = "skip"

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        for region in match.regions:
            inside = set(region.nodes)
            for user in [u for u in region.exits[0].users if u not in inside]:
                user.replace_input_with(region.exits[0], region.entries[0])
            for node in reversed(region.nodes):
                graph.fx.erase_node(node)
        return Effects(tuple(r.name for r in match.regions))


class _Local(nn.Module):
    def __init__(self, body: fx.GraphModule, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = Body(body), Body(head)  # type: ignore[arg-type]

    def forward(self, target: Any, *inputs: Any) -> Any:
        x = self.body(*(i.detach() if isinstance(i, Tensor) and i.is_floating_point() and not i.is_leaf else i for i in inputs))
        return (x, F.cross_entropy(self.head(x.mean((2, 3))), target)) if self.training else (x, None)


class Part(_Selecting):
    """Everything up to a block becomes a module with a loss of its own; a head is put beside it."""

    use: ClassVar[str] = "part"

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        last = match.regions[-1]
        order = {n: i for i, n in enumerate(graph.nodes)}
        nodes = tuple(n for n in graph.nodes if order[n] <= order[last.exits[0]] and n.op != "placeholder")
        aux = nn.Module()
        aux.add_module("0", nn.Linear(8, 10))
        graph.module.add_module("aux", aux)
        head = graph.module.get_submodule("aux.0")
        graph.add_section(Section("first", nodes, lambda body: _Local(body, head), self.use, target=True))
        return Effects((last.name,), needs=Needs(targets=True))


class Store(_Selecting):
    """What comes out of a block is kept: training starts there."""

    use: ClassVar[str] = "store"

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        node = match.regions[-1].exits[0]
        return Effects(tuple(r.name for r in match.regions), needs=Needs(features=FeatureCut(node, match.regions[-1].name)))


class Say(_Selecting):
    """Does nothing and says something."""

    use: ClassVar[str] = "say"
    status: str
    detail: dict[str, str] = {}

    def rewrite(self, graph: graphopt.Graph, match: Match) -> Effects:
        names = tuple(r.name for r in match.regions)
        return Effects(names, marks={n: Mark(self.status, detail=self.detail) for n in names})
