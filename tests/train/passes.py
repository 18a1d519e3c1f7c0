"""Passes that exist to try the runner."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphopt import ActiveMatch, Editor, Effects, Graph, Match, Pass, RuntimeNeeds, Selector, Status, select
from graphopt.ir.nodes import leaf
from graphopt.runtime.body import Body
from graphopt.runtime.by_mode import always_eval


class _OnSelected(Pass):
    """Acts on what is selected."""

    select: Selector = "blocks.0"

    def match(self, graph: Graph) -> Match[None]:
        return Match(select(self.select, graph))


class Hold(_OnSelected):
    """Takes its regions out of training; `norms = false` forgets the statistics, as one easily does."""

    name: ClassVar[str] = "hold"
    select: Selector = "blocks.*"
    norms: bool = True

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        for region in match.regions:
            edit.freeze(region.parameters)
            for node in region.nodes:
                norm = leaf(edit.graph, node)
                if self.norms and isinstance(norm, nn.BatchNorm2d):
                    edit.replace_leaf(node, always_eval(norm))
            effects.mark(region.name, Status.FROZEN)
        return effects


class Lossy(nn.Module):
    """A section with a loss of its own: the mean square of what leaves it."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, target: Tensor | None, *inputs: Any) -> Any:
        output = self.body(*inputs)
        if not self.training:
            return output, None
        assert target is not None
        return output, 0.01 * output.square().mean() + 0.0 * target.sum()


class Local(_OnSelected):
    """Needs targets: its regions have losses of their own."""

    name: ClassVar[str] = "local"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects(needs=RuntimeNeeds(targets=True))
        for region in match.regions:
            edit.outline(region.nodes, Lossy, "local", target=True)
            effects.mark(region.name, Status.ISOLATED)
        return effects


class Extra(_OnSelected):
    """Gives its regions' outputs a learnable factor, drawn at random: a parameter that only exists in some phases."""

    name: ClassVar[str] = "extra"

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects(to_original_state=lambda state: {n: v for n, v in state.items() if not n.endswith(".extra")})
        for region in match.regions:
            path, exit_ = f"{region.name}.extra", region.exits[0]
            edit.add_parameter(path, nn.Parameter(1 + 0.1 * torch.randn(1)))
            factor = edit.read(path, before=exit_.next, like=exit_)
            edit.redirect(exit_, edit.call(torch.mul, (exit_, factor), after=factor, like=exit_))
            effects.mark(region.name, Status.REWIRED)
        return effects
