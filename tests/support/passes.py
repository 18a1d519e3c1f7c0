"""Passes that exist to try the compiler: each is honest, or lies in one way."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphopt import ActiveMatch, Editor, Effects, Graph, Match, Pass, Selector, Status, select
from graphopt.compiler.pass_base import ALL_PROPERTIES, Property
from graphopt.runtime.body import Body


class Recompute(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.body, *inputs, use_reentrant=False) if torch.is_grad_enabled() else self.body(*inputs)


class Selecting(Pass):
    select: Selector = "blocks.*"

    def match(self, graph: Graph) -> Match[None]:
        return Match(select(self.select, graph))

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        for region in match.regions:
            self.edit(edit, region)
            effects.mark(region.name, Status.REWIRED)
        return effects

    def edit(self, edit: Editor, region: Any) -> None:
        raise NotImplementedError


class Outline(Selecting):
    """Outlines its regions: changes nothing that can be seen from outside."""

    name: ClassVar[str] = "outline"
    preserves: ClassVar[frozenset[Property]] = ALL_PROPERTIES

    def edit(self, edit: Editor, region: Any) -> None:
        edit.outline(region.nodes, Recompute, f"outline_{region.name.replace('.', '_')}")


class Still(Selecting):
    """Takes parameters out of training and nothing else."""

    name: ClassVar[str] = "still"
    preserves: ClassVar[frozenset[Property]] = ALL_PROPERTIES
    claim: ClassVar[str] = "still"

    def edit(self, edit: Editor, region: Any) -> None:
        edit.freeze(region.parameters)


class Gone(Selecting):
    """Bypasses its regions."""

    name: ClassVar[str] = "gone"
    claim: ClassVar[str] = "gone"
    conflicts_with: ClassVar[frozenset[str]] = frozenset({"still"})
    preserves: ClassVar[frozenset[Property]] = frozenset({"state-dict keys"})

    def match(self, graph: Graph) -> Match[None]:
        match = super().match(graph)
        for region in match.regions:
            if not region.closed:
                match.refuse(region.name, "has no single way through")
        return match

    def edit(self, edit: Editor, region: Any) -> None:
        outside = [user for user in region.exits[0].users if user not in region.nodes]
        edit.redirect(region.exits[0], region.entries[0], outside)
        edit.erase(region.nodes)


class Liar(Selecting):
    """Doubles what leaves its regions; `about` is the promise it makes all the same."""

    name: ClassVar[str] = "liar"
    about: Property = "eval output"

    def preserved_properties(self) -> frozenset[Property]:
        return frozenset({self.about})

    def edit(self, edit: Editor, region: Any) -> None:
        exit_ = region.exits[0]
        edit.redirect(exit_, edit.call(torch.mul, (exit_, 1.0001), after=exit_))
        if self.about == "state-dict keys":
            edit.graph.module.register_buffer("stray", torch.zeros(()))


class Fails(Selecting):
    """Breaks half-way through its rewrite."""

    name: ClassVar[str] = "fails"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        edit.graph.module.get_submodule("stem").weight.data.zero_()
        raise ZeroDivisionError("half-way")
