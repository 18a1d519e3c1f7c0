"""Passes that exist to try the runner."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphopt import Effects, Graph, Match, Needs, Pass, Section, Selector, select
from graphopt.runtime.body import Body


class HeldNorm(nn.BatchNorm2d):
    """In eval semantics whatever it is told."""

    def train(self, mode: bool = True) -> HeldNorm:
        super().train(False)
        return self


class Hold(Pass):
    """Takes its regions out of training; `norms = false` forgets the statistics, as one easily does."""

    use: ClassVar[str] = "hold"
    select: Selector = "blocks.*"
    norms: bool = True

    def match(self, graph: Graph) -> Match:
        return Match(select(self.select, graph))

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            for name in region.parameters:
                graph.module.get_parameter(name).requires_grad_(False)
            for node in region.nodes:
                norm = graph.module.get_submodule(node.target) if node.op == "call_module" else None
                if self.norms and isinstance(norm, nn.BatchNorm2d):
                    held = HeldNorm(norm.num_features)
                    held.__dict__.update(norm.__dict__)
                    held.train(False)
                    parent, _, name = str(node.target).rpartition(".")
                    setattr(graph.module.get_submodule(parent), name, held)
        return Effects(tuple(r.name for r in match.regions))


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


class Local(Pass):
    """Needs targets: the first region pays a loss where it stands."""

    use: ClassVar[str] = "local"
    select: Selector = "blocks.0"

    def match(self, graph: Graph) -> Match:
        return Match(select(self.select, graph))

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            graph.add_section(Section("local", region.nodes, Lossy, self.use, target=True))
        return Effects(tuple(r.name for r in match.regions), needs=Needs(targets=True))


class Extra(Pass):
    """Gives its regions' outputs a learnable factor, drawn at random: a parameter that only exists in some phases."""

    use: ClassVar[str] = "extra"
    select: Selector = "blocks.0"

    def match(self, graph: Graph) -> Match:
        return Match(select(self.select, graph))

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        for region in match.regions:
            path, exit_ = f"{region.name}.extra", region.exits[0]
            graph.module.get_submodule(region.name).register_parameter("extra", nn.Parameter(1 + 0.1 * torch.randn(1)))
            with graph.fx.inserting_after(exit_):
                factor = graph.fx.get_attr(path)
            with graph.fx.inserting_after(factor):
                scaled = graph.fx.call_function(torch.mul, (exit_, factor))
            for node in (factor, scaled):
                node.meta |= {"origin": exit_.meta["origin"], "by": self.use}
            exit_.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)

        def restore(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value for name, value in state.items() if not name.endswith(".extra")}

        return Effects(tuple(r.name for r in match.regions), restore=restore)
