"""share: blocks use a learned mix of their neighbours' weights instead of their own.

Replacement Learning (arXiv 2410.01239) and RepL (arXiv 2605.19533).

`mode = "mix"` keeps the block's computation and replaces its weights: `w_i = a * w_(i-1) + b * w_(i+1)` (equation 1), with two learnable
scalars per block. The neighbours' weights get gradients from both blocks that use them. This saves parameters, gradients and optimizer
state; it saves neither FLOPs nor activations, because the same operations run: the report shows it. A checkpoint of such a plan is
written under the backbone's own keys, with the mixes computed, and loads into the untouched backbone.

`mode = "surrogate"` removes the block, and puts one light operator with the block's shortcut and a norm of its own in its place, whose
weights are such a mix. This saves FLOPs, activations and time as well. The backbone's architecture cannot
express the result: `export` reports that, and `graphopt.save` / `graphopt.load` store it with its spec.

A block is shared when the blocks before and after it, in execution order, hold tensors of its shapes; every other selected block is left
alone, with the reason in the report. Norms stay a block's own, with their statistics.

    [[pass]]
    use = "share"
    every = 4
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn

import pydantic
from pydantic import Field, StrictBool, StrictFloat

from graphopt import ActiveMatch, Effects, Filter, Match, Pass, PassError, SelectError, Selector, Status
from graphopt.compiler.pass_base import Candidate
from graphopt.passes.share.options import Boundary, Mode, Part

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from graphopt import Editor, Graph, Region
    from graphopt.passes.share.mix import Mixture
    from graphopt.passes.share.neighbours import Decision, SharedBlock
    from graphopt.passes.share.surrogate import Surrogate


class Share(Pass):
    """Replaces blocks' weights by learnable mixes of their neighbours'.

    Attributes:
        select: the blocks, or parts of blocks, that use their neighbours' weights; see selectors. Default: every block that `every` leaves.
        every: only each k-th of what is selected (the k-th, 2k-th, ...). Default: 4, or everything where `select` is given.
        mode: "mix" (same computation, mixed weights) or "surrogate" (one light operator in the block's place).
        parts: of transformer blocks, "attention", "mlp" or "all". Default: attention; "all" for blocks without attention.
        norm: "own" leaves each block its norms, "mix" mixes their weights and biases too (running statistics stay its own).
        scalars: one pair a, b per "block", or one per "parameter" tensor. Shape (), float32, never weight-decayed.
        init: initial a (the block before) and b (the block after). A one-sided mix starts with their sum.
        detach: stop gradients from the mix into the neighbours; then only a and b learn there.
        boundary: what happens where a neighbour has other shapes, or there is none. "skip" leaves the block alone, which gives
            the published counts; "nearest" takes the nearest equal-shaped block of the stage on that side; "one-sided" does
            too, and uses the other side alone where there is none.
        when: from which epoch. A mix can be taken back (`until`): the block then starts from the mixed weights.

    Refuses: a selection in which no block can be shared, attention where there is none, a surrogate that is to be taken back.
    """

    name: ClassVar[str] = "share"
    claim: ClassVar[str | None] = "shared"

    select: Selector | None = None
    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    mode: Mode = "mix"
    parts: Part | None = None
    norm: Literal["own", "mix"] = "own"
    scalars: Literal["block", "parameter"] = "block"
    init: tuple[StrictFloat, StrictFloat] = (0.5, 0.5)
    detach: StrictBool = False
    boundary: Boundary = "skip"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _every_fourth(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("select") is None and data.get("every") is None:
            return {**data, "every": 4}
        return data

    @property
    def lost_under(self) -> frozenset[str]:
        """A frozen block keeps its own weights, which those of a surrogate cannot become."""
        return frozenset({"frozen", "removed"}) if self.mode == "surrogate" else frozenset()

    def match(self, graph: Graph) -> Match[Decision]:
        from graphopt.ir.select import select
        from graphopt.passes.share.neighbours import match_neighbours
        from graphopt.passes.share.surrogate import is_norm

        regions = select(Filter(blocks=True) if self.select is None else self.select, graph)
        selected = regions[self.every - 1 :: self.every] if self.every else regions
        if not selected:
            what = "blocks" if self.select is None else "selected regions"
            raise SelectError(f"every = {self.every} takes none of the {len(regions)} {what}", fix=f"Use at most {len(regions)}")
        mix_norms = self.norm == "mix"
        match = match_neighbours(graph, selected, mode=self.mode, parts=self.parts, mix_norms=mix_norms, boundary=self.boundary)
        if not match.regions:
            first, *more = match.diagnostics
            what = f"none of the {len(selected)} selected blocks can be shared; the first: " if more else "it cannot be shared: "
            match.refuse(first.location, what + first.message, fix="Select other blocks, or see the pass's options")
            return match
        until = getattr(self.when, "until", None)
        if self.mode == "mix":
            why = "mixed weights save parameters, gradients and optimizer state, not FLOPs or activations"
            match.note("the shared blocks", f'{why}; mode = "surrogate" saves those too')
        elif until is not None:
            why = f"a surrogate cannot be taken back at epoch {until}: the block's own weights are gone"
            match.refuse(match.names[0], why, fix="Leave `until` out")
        else:
            for region in match.regions:
                if len(region.paths) > 1 and not any(is_norm(graph, n) for n in region.parameters):
                    match.note(region.name, "a unit without a norm saves one activation, and so does its surrogate, which saves FLOPs only")
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[Decision]) -> Effects:
        from graphopt.ir.paths import owner
        from graphopt.passes.share.mix import compute_mixtures, fit_mixtures, replace_weights
        from graphopt.passes.share.surrogate import put_surrogate

        module, effects, per_tensor = edit.graph.module, Effects(), self.scalars == "parameter"
        keys, before = set(module.state_dict()), sum(p.numel() for p in module.parameters())
        mixtures: list[Mixture] = []
        narrowed: dict[str, int | None] = {}
        blocks = []
        for block in (match.decision[name] for name in match.names):
            if _is_frozen(edit.graph, block):
                effects.warn(block.region, "it is frozen, so it keeps its own weights: a mix would move with its neighbours")
            else:
                blocks.append(block)
        # Found before the first edit: what is known of the whole graph would have to be found again after each.
        surrogates = [self._surrogate(edit.graph, block) for block in blocks] if self.mode == "surrogate" else []
        bypassed: dict[Node, Node] = {}
        for number, block in enumerate(blocks):
            channels = None
            if surrogates:
                channels, names = put_surrogate(edit, *surrogates[number], bypassed)
                narrowed |= dict.fromkeys(names, channels)
            mixtures += replace_weights(edit, block, init=self.init, per_tensor=per_tensor, detach=self.detach, channels=channels)
            for position, source in enumerate(block.sources):
                if not any(module.get_parameter(t.sources[position]).requires_grad for t in block.tensors):
                    effects.warn(block.region, f"its neighbour {source} is frozen: of that part of the mix only the scalar trains")
            a, b = self.init
            effects.mark(block.region, Status.SHARED, sources=block.sources, a=a, b=b, mode=self.mode, part=block.part)
        removed = before - sum(p.numel() for p in module.parameters())
        effects.figures = {"shared": len(effects.regions), "tensors_replaced": len(mixtures), "parameters_removed": removed}
        effects.no_decay = frozenset(n for m in mixtures for n in m.scalars)
        if not mixtures:
            return effects
        if self.mode == "mix":
            effects.to_original_state = partial(compute_mixtures, mixtures=mixtures)
            effects.from_original_state = partial(fit_mixtures, mixtures=mixtures)
        else:
            effects.to_original_state = partial(_refuse_export, path=owner(owner(mixtures[0].scalars[0])))
            effects.from_original_state = partial(_without, gone=keys - set(module.state_dict()), narrowed=narrowed)
        return effects

    def _surrogate(self, graph: Graph, block: SharedBlock) -> tuple[Region, Surrogate]:
        """The block in the graph as earlier passes have left it, and what its surrogate would be."""
        from graphopt.ir.regions import region_of
        from graphopt.passes.share.surrogate import NotShareable, surrogate_of

        region = region_of(graph, block.paths)
        try:
            return region, surrogate_of(graph, region, self.parts)
        except NotShareable as reason:
            raise PassError(f"an earlier pass has changed it: {reason}", where=block.region, fix="Put share first") from None

    @classmethod
    def schedules(cls, graph: Graph, epochs: int) -> Iterable[Candidate]:
        for every in (4, 3, 2):
            yield Candidate(f"surrogates, every = {every}", cls(every=every, mode="surrogate"))


def _is_frozen(graph: Graph, block: SharedBlock) -> bool:
    """Whether an earlier pass, or the user, has taken all that a block would replace out of training."""
    from graphopt.passes.share.mix import parameter_at

    found = [parameter_at(graph, t.name) for t in block.tensors]
    return all(p is not None and not p.requires_grad for p in found)


def _refuse_export(_: dict[str, Tensor], path: str) -> NoReturn:
    fix = "Store the weights with their spec: graphopt.save(plan, path); graphopt.load(path) gives the model back"
    what = "light operators have replaced blocks, and the backbone's architecture cannot express them"
    raise PassError(what, where=f"share, {path}", fix=fix)


def _without(state: dict[str, Tensor], gone: set[str], narrowed: Mapping[str, int | None]) -> dict[str, Tensor]:
    """A checkpoint of the backbone without what is gone, and with norms narrowed to the channels of partial convolutions."""
    return {k: v[: narrowed[k]] if k in narrowed else v for k, v in state.items() if k not in gone}
