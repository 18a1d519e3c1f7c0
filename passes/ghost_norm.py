"""ghost_norm: batch norms take their statistics over a few samples at a time.

Ghost batch normalisation (Hoffer, Hubara and Soudry, arXiv 1705.08741, algorithm 1): in training each run of `samples` samples of a batch
is normalised by its own mean and variance, and the running statistics move by each of them in turn. A large batch then trains with the
noise of a small one, and what one process sees in its batch resembles what each of several processes would see.

Evaluation, parameters, keys and FLOPs stay as they are, so nothing is to be done at export; a step has more kernel calls.

    [[pass]]
    use = "ghost_norm"
    samples = 32
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from graphopt import ActiveMatch, Effects, Match, Pass, Selector, Status
from graphopt.compiler.pass_base import Property

if TYPE_CHECKING:
    from graphopt import Editor, Graph


class GhostNorm(Pass):
    """Normalises runs of a few samples, each by its own statistics.

    Attributes:
        select: regions whose batch norms change; see selectors. Default: all.
        samples: of each run. The last run takes what is left over; a batch of less than two runs is normalised whole.
        when: from which epoch, until which.

    Preserves eval output and state-dict keys. Refuses: a selection without plain batch norms.
    """

    name: ClassVar[str] = "ghost_norm"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "state-dict keys"})

    select: Selector | None = None
    samples: Annotated[int, Field(ge=2, strict=True)] = 32

    def match(self, graph: Graph) -> Match[dict[str, tuple[str, ...]]]:
        from graphopt.passes.layers import ghost_norm, leaves_in

        found = leaves_in(self.select, graph, lambda layer: ghost_norm(layer, self.samples) is not None)
        match = Match(tuple(found), {region.name: paths for region, paths in found.items()})
        for region, paths in found.items():
            if not paths:
                match.skip(region.name, "it has no batch norm of torch's own")
        if not any(found.values()):
            match.refuse(
                next(iter(match.names), "the backbone"), "there is no batch norm of torch's own", fix="Select regions that have one"
            )
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[dict[str, tuple[str, ...]]]) -> Effects:
        from graphopt.ir.nodes import leaf
        from graphopt.passes.layers import calls_of, ghost_norm

        effects, count = Effects(), 0
        calls = calls_of(edit, (path for name in match.names for path in match.decision[name]), effects)
        for name in match.names:
            changed = 0
            for path in match.decision[name]:
                if (node := calls.pop(path, None)) is None:
                    continue
                if (ghost := ghost_norm(leaf(edit.graph, node), self.samples)) is not None:
                    edit.replace_leaf(node, ghost)
                    changed += 1
                else:
                    effects.skip(path, "an earlier pass has given it another form")
            if changed:
                effects.mark(name, Status.REWIRED, norms=changed, samples=self.samples)
            count += changed
        effects.figures = {"norms": count}
        return effects
