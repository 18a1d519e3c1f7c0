"""factorize: linear layers and convolutions become two of lower rank.

A layer's weight, a matrix of its outputs by what each of them reads, is replaced by the product of two of rank r: the nearest of that rank,
by its singular values (Eckart and Young, 1936). A linear layer becomes `in -> r -> out`; a convolution becomes one of the same size with r
channels and a 1 x 1 convolution (Denton et al., arXiv 1404.0736; Zhang et al., arXiv 1411.4229). This saves parameters, gradients,
optimizer state and FLOPs where r is small enough; a layer for which it would not save parameters is left alone.

The network then computes something else, so train it on. The report gives the share of each selection's weights, in squared norm, that is
kept. `export` multiplies back, and the ordinary model computes what the factorized one did, up to rounding.

    [[pass]]
    use = "factorize"
    select = "layer4"
    rank = 0.25
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

from pydantic import Field

from graphopt import ActiveMatch, Effects, Filter, Match, Pass, Selector, Status

if TYPE_CHECKING:
    from torch import Tensor

    from graphopt import Editor, Graph
    from graphopt.passes.layers import Dense

Ranks = dict[str, int]


class Factorize(Pass):
    """Replaces layers by products of two of lower rank.

    Attributes:
        select: regions whose linear layers and 2-d convolutions (of one group) are factorized; see selectors.
        rank: of the product: a number, or a share of the full rank (0.25 is a quarter of it, rounded, at least 1).
        when: from which epoch, until which. Taken back, the layers start from the product.

    Refuses: a selection in which no layer would be smaller.
    """

    name: ClassVar[str] = "factorize"
    claim: ClassVar[str | None] = "factorized"
    conflicts_with: ClassVar[frozenset[str]] = frozenset({"shared", "factorized"})

    select: Selector = Filter(blocks=True)
    rank: Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.25

    def match(self, graph: Graph) -> Match[dict[str, Ranks]]:
        from graphopt.ir.select import select
        from graphopt.passes.layers import dense_layers, full_rank

        match = Match[dict[str, Ranks]](select(self.select, graph))
        match.decision = found = {}
        for region in match.regions:
            ranks: Ranks = {}
            for path, why in dense_layers(graph, region):
                if why is None:
                    weight = graph.module.get_parameter(f"{path}.weight")
                    rank = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * full_rank(weight)))
                    if rank * (len(weight) + weight[0].numel()) < weight.numel():
                        ranks[path] = rank
                        continue
                    why = f"two layers of rank {rank} have no fewer weights than its {weight.numel():,}"
                match.skip(path, why)
            found[region.name] = ranks
        if not any(found.values()):
            match.refuse(match.regions[0].name, "no selected layer gets smaller", fix="Select others, or lower the rank")
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[dict[str, Ranks]]) -> Effects:
        from graphopt.ir.nodes import leaf
        from graphopt.passes.layers import beside, calls_of, divide, low_rank_pair, multiply

        effects, ranks, inners, kept, whole = Effects(), Ranks(), dict[str, str](), 0.0, 0.0
        calls = calls_of(edit, (path for name in match.names for path in match.decision[name]), effects)
        for name in match.names:
            for path, rank in match.decision[name].items():
                if (node := calls.pop(path, None)) is None:
                    continue
                layer = cast("Dense", leaf(edit.graph, node))
                first, second = low_rank_pair(layer, *divide(layer.weight, rank))
                second.bias = layer.bias
                kept += multiply(first.weight, second.weight).square().sum().item()
                whole += layer.weight.square().sum().item()
                inner = edit.call_module(beside(edit.graph, path, "factor"), first, node.args[:1], before=node)
                edit.replace_leaf(node, second)
                edit.set_call(node, args=(inner,))
                ranks[path], inners[path] = rank, str(inner.target)
            if done := sum(path in ranks for path in match.decision[name]):
                effects.mark(name, Status.REWIRED, layers=done)
        effects.figures = {"layers": len(ranks), "kept_share_of_squared_weights": round(kept / whole, 4) if whole else 1.0}
        effects.to_original_state = partial(_multiplied, inners=inners)
        effects.from_original_state = partial(_divided, inners=inners, ranks=ranks)
        return effects


def _multiplied(state: dict[str, Tensor], inners: dict[str, str]) -> dict[str, Tensor]:
    from graphopt.passes.layers import multiply

    for path, inner in inners.items():
        state[f"{path}.weight"] = multiply(state.pop(f"{inner}.weight"), state[f"{path}.weight"])
    return state


def _divided(state: dict[str, Tensor], inners: dict[str, str], ranks: Ranks) -> dict[str, Tensor]:
    from graphopt.passes.layers import divide

    for path, rank in ranks.items():
        state[f"{inners[path]}.weight"], state[f"{path}.weight"] = divide(state[f"{path}.weight"], rank)
    return state
