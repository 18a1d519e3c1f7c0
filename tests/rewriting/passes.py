"""Passes that exist to try the pipeline: each is honest or lies in one way."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphopt import Effects, Graph, Match, Note, Pass, Section, Selector, select
from graphopt.compiler.pass_base import Property
from graphopt.runtime.body import Body


class Recompute(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.body, *inputs, use_reentrant=False) if torch.is_grad_enabled() else self.body(*inputs)


class Selecting(Pass):
    select: Selector = "blocks.*"

    def match(self, graph: Graph) -> Match:
        return Match(select(self.select, graph))


class Stretch(Selecting):
    """Outlines its regions: changes nothing that can be seen from outside."""

    use: ClassVar[str] = "stretch"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "training output", "state-dict keys", "gradients of the rest"})

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            graph.add_section(Section(f"stretch_{region.name.replace('.', '_')}", region.nodes, Recompute, self.use))
        return Effects(tuple(r.name for r in match.regions))


class Still(Selecting):
    """Takes parameters out of training and nothing else."""

    use: ClassVar[str] = "still"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "training output", "state-dict keys", "gradients of the rest"})
    claim: ClassVar[str] = "still"

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            for name in region.parameters:
                graph.module.get_parameter(name).requires_grad_(False)
        return Effects(tuple(r.name for r in match.regions))


class Gone(Selecting):
    """Bypasses its regions."""

    use: ClassVar[str] = "gone"
    claim: ClassVar[str] = "gone"
    excludes: ClassVar[frozenset[str]] = frozenset({"still"})
    preserves: ClassVar[frozenset[Property]] = frozenset({"state-dict keys"})

    def check(self, graph: Graph, match: Match) -> list[Note]:
        return [Note("refuse", r.name, "has no single way through") for r in match.regions if not r.closed]

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            region.exits[0].replace_all_uses_with(region.entries[0], delete_user_cb=lambda n, r=region: n not in r.nodes)
            for node in reversed(region.nodes):
                graph.fx.erase_node(node)
        return Effects(tuple(r.name for r in match.regions))


class Liar(Selecting):
    """Doubles what leaves its regions; `about` is the promise it makes all the same."""

    use: ClassVar[str] = "liar"
    about: Property = "eval output"

    def promises(self) -> frozenset[Property]:
        return frozenset({self.about})

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            exit_ = region.exits[0]
            with graph.fx.inserting_after(exit_):
                twice = graph.fx.call_function(torch.mul, (exit_, 1.0001))
            twice.meta["origin"] = exit_.meta["origin"]
            exit_.replace_all_uses_with(twice, delete_user_cb=lambda n, t=twice: n is not t)
        if self.about == "state-dict keys":
            graph.module.register_buffer("stray", torch.zeros(()))
        return Effects(tuple(r.name for r in match.regions))


class Fails(Selecting):
    """Breaks half-way through its rewrite."""

    use: ClassVar[str] = "fails"

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        graph.module.get_submodule("stem").weight.data.zero_()
        raise ZeroDivisionError("half-way")
