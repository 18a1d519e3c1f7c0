"""adapt: the backbone stays as it is, and chosen layers learn a low-rank addition to their weights.

LoRA (Hu et al., arXiv 2106.09685, equation 3): `h = W x + scale * B A x`, W fixed, A of r rows, B starting with zeros. A convolution's A is
a convolution of its size to r channels, its B a 1 x 1 one. Everything else is frozen as `freeze` does it: no gradients, norms on their
running statistics, which stay put to the bit, lean operators behind what trains. What `train` names, the classifier by default, trains
fully. `export` adds the products to the weights, and the ordinary model comes back, with the statistics that it was trained with.

This saves gradients and optimizer state, to almost nothing. Of activations it saves what `freeze` does behind layers that train: much in
convolutional networks, hardly anything in transformers; `graphopt apply` forecasts how much.

    [[pass]]
    use = "adapt"
    rank = 8
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

from pydantic import Field

from graphopt import ActiveMatch, Effects, Filter, Match, Pass, PassError, Selector, Status
from graphopt.compiler.pass_base import Property

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from graphopt import Editor, Graph
    from graphopt.passes.layers import Dense


#: paths of the two layers of an addition
Pair = tuple[str, str]


@dataclass(frozen=True)
class Decision:
    """Paths of the layers to adapt, by region; those of what trains fully."""

    layers: dict[str, tuple[str, ...]]
    trained: tuple[str, ...]


class Adapt(Pass):
    """Freezes the backbone, and lets chosen layers learn low-rank additions.

    Attributes:
        select: regions whose linear layers and 2-d convolutions (of one group) are adapted; see selectors.
        rank: r, the rank of each addition.
        scale: the factor of the addition (alpha / r in the paper).
        train: regions that train fully. Default: the last layer with parameters, which is the classifier.
        when: from which epoch.

    Preserves: eval output at its start, state-dict keys at export. Refuses: a selection without such layers; to be taken back; a second
    adapt in the spec.
    """

    name: ClassVar[str] = "adapt"
    claim: ClassVar[str | None] = "adapted"
    conflicts_with: ClassVar[frozenset[str]] = frozenset({"frozen", "shared", "factorized", "adapted"})
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output"})
    once: ClassVar[bool] = True
    exclusive: ClassVar[bool] = True

    select: Selector = Filter(blocks=True)
    rank: Annotated[int, Field(ge=1, strict=True)] = 8
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    train: Selector | None = None

    def match(self, graph: Graph) -> Match[Decision]:
        from graphopt.ir.nodes import parameters_read
        from graphopt.ir.paths import is_below
        from graphopt.ir.select import select
        from graphopt.passes.layers import dense_layers, full_rank

        match = Match[Decision](select(self.select, graph))
        last = [str(n.target) for n in graph.nodes if any(name not in graph.unused for name, _ in parameters_read(graph.module, n))][-1:]
        trained = tuple(last) if self.train is None else tuple(p for r in select(self.train, graph) for p in r.paths)
        layers = {}
        for region in match.regions:
            found = []
            for path, why in dense_layers(graph, region):
                if is_below(path, trained):
                    why = "it trains fully"
                elif why is None and self.rank >= full_rank(graph.module.get_parameter(f"{path}.weight")):
                    why = f"its own rank is no more than {self.rank}"
                if why is None:
                    found.append(path)
                else:
                    match.skip(path, why)
            layers[region.name] = tuple(found)
        if not any(layers.values()):
            skipped = [f": {d.location}: {d.message}" for d in match.diagnostics][:1]
            what = f"no selected layer can be adapted{''.join(skipped)}"
            match.refuse(match.regions[0].name, what, fix="Select other linear layers or convolutions, or lower the rank")
        if (until := getattr(self.when, "until", None)) is not None:
            why = f"it cannot be taken back at epoch {until}: the weights would lose what they have learnt"
            match.refuse(match.regions[0].name, why, fix="Leave `until` out: export adds the products to the weights")
        # A trigger that takes one region after the other must find something to train in the first.
        match.regions = tuple(region for region in match.regions if layers[region.name])
        match.decision = Decision(layers, trained)
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[Decision]) -> Effects:
        import torch

        from graphopt.ir.nodes import leaf
        from graphopt.ir.paths import is_below
        from graphopt.passes.layers import beside, calls_of, low_rank_pair, zero_pair

        effects, pairs = Effects(), dict[str, Pair]()
        backbone, base = {n for n, _ in edit.graph.module.named_parameters()}, edit.graph.nodes
        calls = calls_of(edit, (path for name in match.names for path in match.decision.layers[name]), effects)
        for name in match.names:
            for path in match.decision.layers[name]:
                if (node := calls.pop(path, None)) is None:
                    continue
                layer = cast("Dense", leaf(edit.graph, node))
                # Other weights for another seed.
                first, second = low_rank_pair(layer, *zero_pair(layer, self.rank, torch.initial_seed() + len(pairs)))
                inner = edit.call_module(beside(edit.graph, path, "down"), first, node.args[:1], after=node)
                outer = edit.call_module(beside(edit.graph, path, "up"), second, (inner,), after=inner)
                total = edit.call(torch.add, (node, outer), {"alpha": self.scale}, after=outer)
                edit.redirect(node, total, [u for u in node.users if u is not total])
                pairs[path] = str(inner.target), str(outer.target)
            if count := len(pairs.keys() & set(match.decision.layers[name])):
                paths, trained = match.paths[name], match.decision.trained
                trains = any(is_below(part, paths) for part in trained) or any(is_below(path, trained) for path in paths)
                effects.mark(name, Status.REWIRED if trains else Status.FROZEN, adapted=count, rank=self.rank)
        self._freeze(edit, match.decision.trained, backbone, base)
        sizes = [p.numel() for n, p in edit.graph.module.named_parameters() if p.requires_grad and n not in backbone]
        effects.figures = {"layers": len(pairs), "added_parameters": sum(sizes)}
        effects.to_original_state = partial(_merged, pairs=pairs, scale=self.scale)
        starts = {
            f"{path}.weight": edit.graph.module.get_parameter(f"{path}.weight").detach().clone() for pair in pairs.values() for path in pair
        }
        effects.from_original_state = partial(_started, starts=starts)
        return effects

    def _freeze(self, edit: Editor, trained: tuple[str, ...], names: set[str], nodes: tuple[Node, ...]) -> None:
        """Freezes what the backbone had, `names` and `nodes`, but for what trains fully; as `freeze` does."""
        from graphopt.ir.paths import is_below
        from graphopt.ir.regions import region_of
        from graphopt.passes.freeze.edits import cut_prefix, freeze_norms, freeze_scope, use_lean_operators

        own = set(region_of(edit.graph, trained).nodes)
        frozen = tuple(sorted(n for n in names if not is_below(n, trained)))
        base = replace(region_of(edit.graph, frozen), nodes=tuple(n for n in nodes if n not in own))
        scope = freeze_scope(edit.graph, [base])
        if scope.tied:
            raise PassError(f"it shares its tensor with {scope.tied[0][1]}, which trains", where=scope.tied[0][0], fix="Let both train")
        edit.freeze(scope.parameters)
        freeze_norms(edit, base.nodes, set(scope.behind))
        use_lean_operators(edit, scope.behind)
        edit.keep_buffers(base.nodes)
        cut_prefix(edit, scope.prefix)


def _merged(state: dict[str, Tensor], pairs: dict[str, Pair], scale: float) -> dict[str, Tensor]:
    """The weights with the products added, under the backbone's keys."""
    from graphopt.passes.layers import multiply

    for path, pair in pairs.items():
        first, second = (state.pop(f"{part}.weight") for part in pair)
        state[f"{path}.weight"] = state[f"{path}.weight"] + scale * multiply(first, second)
    return state


def _started(state: dict[str, Tensor], starts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the backbone, with additions that are zero."""
    return state | {name: start.clone() for name, start in starts.items()}
