"""share: a block gives up its own weights and lives on its neighbours' (Replacement Learning, arXiv 2410.01239; RepL, arXiv 2605.19533).

`mode = "mix"` keeps the block's computation and replaces its weights: `w_i = a * w_(i-1) + b * w_(i+1)` (equation 1), with two learnable
scalars per block. The neighbours' weights get gradients from both places. This saves parameters, gradients and optimizer state;
it saves neither FLOPs nor activations, because the same operations run: the report shows it. A checkpoint of such a plan is written under
the backbone's own keys, mixes worked out, and loads into the untouched backbone.

`mode = "surrogate"` removes the block, and puts one light operator with the block's shortcut and a norm of its own in its place, whose
weights are such a mix. This saves FLOPs, activations and time as well (`surrogate.py` has the table). The backbone's architecture cannot
express the result: `export` says so, and `graphopt.save` / `graphopt.load` keep it with its spec.

A block is shared when the blocks before and after it, in execution order, hold tensors of its shapes; every other selected block is left
alone with a reason in the report (`neighbours.py` has the rule, with its exceptions). Norms stay a block's own, with their statistics.

    [[pass]]
    use = "share"
    every = 4
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field
from torch import Tensor, fx

from graphopt.compiler.pass_base import Effects, Mark, Match, Needs, Note, Pass, StateMap
from graphopt.errors import PassError, SelectError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.regions import Index, Region
from graphopt.ir.select import Filter, Selector, select
from graphopt.passes.share.mix import Manner, Mixed, give_up_weights, materialise, recognise, stamp
from graphopt.passes.share.neighbours import Found, Sharing, find
from graphopt.passes.share.parts import is_norm, owner_of
from graphopt.passes.share.surrogate import Unfit, make_partial, partial_slice, partial_width, surrogate_of, take_out


class Share(Pass):
    """Replaces blocks' weights by learnable mixes of their neighbours'.

    Attributes:
        select: the blocks, or parts of blocks, that give up their weights; see selectors. Default: every block that `every` leaves.
        every: only each k-th of what is selected (the k-th, 2k-th, ...). Default: 4, or everything where `select` is given.
        mode: "mix" (same computation, mixed weights) or "surrogate" (one light operator in the block's place).
        parts: of transformer blocks, "attention", "mlp" or "all". Default: attention; "all" for blocks that do not attend.
        norm: "own" keeps each block's norms, "mix" mixes their weights and biases too (running statistics stay its own).
        scalars: one pair a, b per "block", or one per "parameter" tensor. Shape (), float32, never weight-decayed.
        init: initial a (the block before) and b (the block after). A one-sided mix starts with their sum.
        detach: stop gradients from the mix into the neighbours; then only a and b learn there.
        boundary: what happens where a neighbour has other shapes, or there is none. "skip" leaves the block alone, which gives
            the published counts; "nearest" takes the nearest equal-shaped block of the stage on that side; "one-sided" does
            too, and where there is none lives on the other side alone.
        when: from which epoch. A mix can be taken back (`until`): the block then starts from the mixed weights.

    Refuses: a selection in which no block can be shared, attention where there is none, a surrogate that is to be taken back.
    """

    use: ClassVar[str] = "share"
    claim: ClassVar[str | None] = "shared"

    select: Selector | None = None
    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    mode: Literal["mix", "surrogate"] = "mix"
    parts: Literal["attention", "mlp", "all"] | None = None
    norm: Literal["own", "mix"] = "own"
    scalars: Literal["block", "parameter"] = "block"
    init: tuple[float, float] = (0.5, 0.5)
    detach: bool = False
    boundary: Literal["skip", "nearest", "one-sided"] = "skip"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _every_fourth(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("select") is None and data.get("every") is None:
            return {**data, "every": 4}
        return data

    def match(self, graph: Graph) -> Match:
        found = self._found(graph)
        index = Index(graph)
        return Match(tuple(index.region(s.paths) for s in found.shared), found)

    def check(self, graph: Graph, match: Match) -> list[Note]:
        notes = list(match.data.notes)
        until = getattr(self.when, "until", None)
        if self.mode == "surrogate" and until is not None:
            why = f"a surrogate cannot be taken back at epoch {until}: the block's own weights are gone. Leave `until` out"
            notes.append(Note("refuse", match.regions[0].name, why))
        if self.mode == "mix":
            why = (
                'mixed weights save parameters, gradients and optimizer state, not FLOPs or activations; mode = "surrogate" saves those too'
            )
            notes.append(Note("info", "the shared blocks", why))
        for region in match.regions if self.mode == "surrogate" else ():
            if len(region.paths) > 1 and not any(is_norm(graph, n) for n in region.parameters):
                why = "a unit without a norm saves one activation, and so does its surrogate: what is saved here is FLOPs"
                notes.append(Note("info", region.name, why))
        return notes

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        chosen = {r.name for r in match.regions}
        shared = tuple(s for s in match.data.shared if s.region in chosen)
        order = {path: i for i, path in enumerate(graph.paths())}
        keys = set(graph.module.state_dict())
        manner = Manner(self.init, self.scalars == "parameter", self.detach, self.use)
        before = sum(p.numel() for p in graph.module.parameters())
        mixed: list[Mixed] = []
        notes: list[Note] = []
        groups = []
        narrowed: dict[str, int] = {}
        for sharing in shared:
            groups.append(_homes(graph, sharing))
            if self.mode == "mix":
                mixed += give_up_weights(graph, sharing, manner)
            else:
                more, narrow = self._surrogate(graph, sharing, manner)
                mixed += more
                narrowed |= narrow
            notes += _frozen_sources(graph, sharing)
        saved = before - sum(p.numel() for p in graph.module.parameters())
        restore, adopt = self._maps(keys - set(graph.module.state_dict()), tuple(mixed), narrowed)
        start = {"a": self.init[0], "b": self.init[1]}
        return Effects(
            regions=tuple(s.region for s in shared),
            notes=tuple(notes),
            needs=Needs(co_shard=_joined(groups, order)),
            restore=restore,
            adopt=adopt,
            no_decay=frozenset(n for m in mixed for n in m.scalars),
            figures={"shared": len(shared), "tensors_replaced": len(mixed), "parameters_removed": saved},
            marks={s.region: Mark("shared", s.sources, {**start, "mode": self.mode, "part": s.part}) for s in shared},
        )

    # -- selection --------------------------------------------------------------------------------------------------------------
    def _found(self, graph: Graph) -> Found:
        """Who shares with whom: found once, on the untouched backbone, and the same in every phase."""
        key = (self.use, self.model_dump_json(exclude={"when"}))
        if key not in graph.facts:
            found = find(
                graph,
                self._selected(graph),
                mode=self.mode,
                parts=self.parts,
                mix_norms=self.norm == "mix",
                boundary=self.boundary,
            )
            if not found.shared:
                raise PassError(_nobody(found), where=found.notes[0].where, fix="Select other blocks, or see the pass's options")
            graph.facts[key] = found
        return graph.facts[key]

    def _selected(self, graph: Graph) -> tuple[Region, ...]:
        regions = select(Filter(blocks=True) if self.select is None else self.select, graph)
        chosen = regions[self.every - 1 :: self.every] if self.every else regions
        if not chosen:
            named = "blocks" if self.select is None else "selected regions"
            raise SelectError(f"every = {self.every} takes none of the {len(regions)} {named}", fix=f"Use at most {len(regions)}")
        return chosen

    # -- surrogates ---------------------------------------------------------------------------------------------------------------
    def _surrogate(self, graph: Graph, sharing: Sharing, manner: Manner) -> tuple[tuple[Mixed, ...], dict[str, int]]:
        block = Index(graph).region(sharing.paths)
        try:
            found = surrogate_of(graph, block, self.parts)
        except Unfit as reason:
            raise PassError(f"an earlier pass has changed it: {reason}", where=sharing.region, fix="Put share first") from None
        take_out(graph, block, found)
        if found.partial is None:
            return give_up_weights(graph, sharing, manner), {}
        width = partial_width(found.partial)
        new, narrowed = make_partial(graph, found.partial)
        stamp(graph, new, found.partial, self.use)

        def part(source: fx.Node, name: str) -> fx.Node:
            return partial_slice(graph, source, width, name)

        return give_up_weights(graph, sharing, manner, part), narrowed

    # -- checkpoints ----------------------------------------------------------------------------------------------------------------
    def _maps(self, keys: set[str], mixed: tuple[Mixed, ...], narrowed: dict[str, int]) -> tuple[StateMap, StateMap]:
        if self.mode == "mix":
            return (lambda state: materialise(state, mixed)), (lambda state: recognise(state, mixed))
        first = owner_of(mixed[0].scalars[0]).removesuffix(".share")

        def refuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
            raise PassError(
                "light operators stand in the place of blocks, and the backbone's architecture cannot express them",
                where=f"share, {first}",
                fix="Keep the weights with their spec: graphopt.save(plan, path); graphopt.load(path) gives the model back",
            )

        def adopt(state: dict[str, Tensor]) -> dict[str, Tensor]:
            kept = {k: v for k, v in state.items() if k not in keys}
            return {k: v[: narrowed[k]] if k in narrowed and v.ndim else v for k, v in kept.items()}

        return refuse, adopt


def _nobody(found: Found) -> str:
    many = f"none of the {len(found.notes)} selected blocks can be shared; the first: " if len(found.notes) > 1 else "it cannot be shared: "
    return many + found.notes[0].why


def _homes(graph: Graph, sharing: Sharing) -> tuple[str, ...]:
    """Paths of modules that hold what a mix is made of: they must be sharded together."""
    paths = {p for block in find_blocks(graph) for p in block.paths}
    homes: dict[str, None] = {sharing.paths[0]: None}
    for blend in sharing.blends:
        for name in (blend.before, blend.after):
            if name is not None:
                home = owner_of(name)
                homes.setdefault(next((p for p in paths if home == p or home.startswith(f"{p}.")), home))
    return tuple(homes)


def _joined(groups: Iterable[tuple[str, ...]], order: dict[str, int]) -> tuple[tuple[str, ...], ...]:
    """Groups that have a member in common become one: a tensor can be in one sharding group only."""
    joined: list[set[str]] = []
    for group in groups:
        touching = [g for g in joined if g & set(group)]
        joined = [g for g in joined if g not in touching] + [set(group).union(*touching)]
    ordered = [tuple(sorted(g, key=lambda p: order.get(p, len(order)))) for g in joined]
    return tuple(sorted(ordered, key=lambda g: order.get(g[0], len(order))))


def _frozen_sources(graph: Graph, sharing: Sharing) -> list[Note]:
    notes = []
    for side, block in (("before", sharing.before), ("after", sharing.after)):
        names = [getattr(b, side) for b in sharing.blends if getattr(b, side) is not None]
        if block is not None and not any(graph.module.get_parameter(n).requires_grad for n in names):
            notes.append(Note("warn", sharing.region, f"its neighbour {block} is frozen: only its scalars still move that side"))
    return notes
