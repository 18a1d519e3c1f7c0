"""drop: a converged prefix leaves the training graph, forward and backward (Learn&Drop, arXiv 2604.23403).

Early layers come to rest long before late ones. Once a prefix has, it is run over the training set one last time, what it gives is
kept, and training goes on behind it with the kept features as the new input. The weights stay: evaluation and export are the whole
network's.

    [[pass]]
    use = "drop"
    when = { score = ["change", "continuation"], below = [0.05, 0.5], patience = 2, most = 0.8 }
    dtype = "float16"

    [[pass]]                              # a published trajectory, replayed
    use = "drop"
    when = [{ epoch = 3, upto = "layer1" }, { epoch = 5, upto = "layer2" }]

A prefix ends at a *cut point*, an activation that every path from input to output crosses. With a schedule those are the ends of the
parts it names; with a score, the ends of the backbone's blocks. What has been dropped rests for good: parameters do not train, norms
use their running statistics, dropout is off, whatever `module.train()` says. In `plan.module` the prefix runs under `no_grad`;
`plan.suffix` is what is left, with the features as its input.

The runner keeps the features in RAM or on disk (`graphopt.train.features`), and only where that is right: the prefix rests, and every
sample's input is the same each time it is asked for. Random augmentation is a refusal, unless `views = n` fixed views of each sample
are kept. Where the features do not fit, or are read slower than they are computed, the prefix runs under `no_grad` instead: slower, and
nothing else changes.

`mode = "bypass"` is the other way to leave blocks out: residual blocks that keep their input's shape are replaced by their shortcut,
for good, or in each training step with a probability (stochastic depth, arXiv 1603.09382: linear by depth, full in the deepest block;
`when = { schedule = "progressive" }` is progressive layer dropping). Blocks that change shape are left alone. At random, the evaluated
network is the backbone itself and the expectation of the trained one. For good, the evaluated network is the one that was trained; in
the export the bypassed branches end in zeros, so the backbone computes the same.

Refuses: a prefix that is not closed, one that leaves nothing to train, one that shares a parameter with what is behind it, overlap with
freeze, share or another drop.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor, fx

from graphopt.compiler.pass_base import Effects, FeatureCut, Mark, Match, Needs, Note, Pass, Property
from graphopt.compiler.triggers import AtEpoch, Progressive, Start, Steps
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.regions import Region
from graphopt.ir.section import Section
from graphopt.ir.select import Filter, Selector, select
from graphopt.passes.drop.bypass import Residual, StochasticBranch, last_affine, remove, residuals
from graphopt.passes.drop.cut import block_cuts, bytes_per_sample, cut_off, named_cut, stretches
from graphopt.units import Size, show_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Drop(Pass):
    """Takes a prefix out of training, or blocks out of the network.

    Attributes:
        mode: "prefix" or "bypass".
        upto: prefix: the part it ends with, at the furthest; for `when = "start"` and `{ epoch = n }`, exactly.
        cache: prefix: where the features are kept: "ram" or "disk" (memory-mapped, in the run's folder); "none" runs the prefix every time.
        dtype: of the kept features: half the bytes, and half the reading, at about three digits (float16) or two (bfloat16).
        limit: most bytes to keep ("8 GiB"); over it the prefix runs under no_grad instead. Default: what there is.
        views: with random augmentation: so many fixed views of each sample are kept, and taken in turn.
        folder: of a cache on disk, where it shall outlive the run or lie on another disk.
        force: keep the features even if reading them is slower than computing them.
        select: bypass: the blocks; default: all of them.
        probability: bypass: of leaving the deepest block out of a training step; None leaves all of them out for good.
    """

    use: ClassVar[str] = "drop"
    claim: ClassVar[str | None] = "removed"
    excludes: ClassVar[frozenset[str]] = frozenset({"frozen", "shared", "removed"})

    mode: Literal["prefix", "bypass"] = "prefix"
    upto: Annotated[str, Field(min_length=1)] | None = None
    cache: Literal["ram", "disk", "none"] = "ram"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    limit: Size | None = None
    views: Annotated[int, Field(ge=1, strict=True)] | None = None
    folder: str | None = None
    force: bool = False
    select: Selector | None = None
    probability: Annotated[float, Field(gt=0, lt=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _fits_mode(self) -> Drop:
        other = ("select", "probability") if self.mode == "prefix" else ("upto", "cache", "dtype", "limit", "views", "folder", "force")
        wrong = [name for name in other if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default]
        if wrong:
            owner = "bypass" if self.mode == "prefix" else "prefix"
            raise ValueError(f"{' and '.join(wrong)} is of mode = {owner!r}, not of {self.mode!r}")
        if self.mode == "prefix" and isinstance(self.when, Steps) and self.upto is not None:
            raise ValueError("each step of the schedule says its own upto: leave the pass's out")
        if self.mode == "prefix" and isinstance(self.when, Start | AtEpoch) and self.upto is None:
            raise ValueError('say where the prefix ends: upto = "layer2"')
        if isinstance(self.when, Progressive) and self.probability is None:
            raise ValueError("progressive layer dropping skips at random: give a probability")
        if self.folder is not None and self.cache != "disk":
            raise ValueError('folder is for cache = "disk"')
        return self

    def promises(self) -> frozenset[Property]:
        if self.mode == "bypass" and self.probability is None:
            return frozenset({"state-dict keys"})
        return frozenset({"eval output", "state-dict keys", "gradients of the rest"})

    def keeps(self) -> dict[str, Any] | None:
        if self.mode == "bypass" or self.cache == "none":
            return None
        return {name: getattr(self, name) for name in ("cache", "dtype", "limit", "views", "folder", "force")}

    # -- select ---------------------------------------------------------------------------------------------------------------------
    def match(self, graph: Graph) -> Match:
        if self.mode == "bypass":
            regions = select(self.select if self.select is not None else Filter(blocks=True), graph)
            found = {r.name: residuals(graph, r) for r in regions}
            return Match(tuple(r for r in regions if not isinstance(found[r.name], str)), found)
        cuts = self._cuts(graph)
        return Match(stretches(graph, cuts), cuts)

    def _cuts(self, graph: Graph) -> dict[str, fx.Node]:
        """Where this pass may cut, by name."""
        if isinstance(self.when, Steps):
            return {step.upto: named_cut(graph, step.upto) for step in self.when.steps}
        if isinstance(self.when, Start | AtEpoch):
            assert self.upto is not None
            return {self.upto: named_cut(graph, self.upto)}
        cuts = block_cuts(graph)
        if self.upto is not None:
            last = named_cut(graph, self.upto)
            order = {n: i for i, n in enumerate(graph.nodes)}
            cuts = {name: cut for name, cut in cuts.items() if order[cut] < order[last]} | {self.upto: last}
        if not cuts:
            raise PassError(
                "no block of this backbone ends at a cut point with something left to train behind it",
                fix='Name the parts instead: when = [{ epoch = 3, upto = "..." }] (graphopt inspect shows the cut points)',
            )
        return cuts

    # -- check ----------------------------------------------------------------------------------------------------------------------
    def check(self, graph: Graph, match: Match) -> list[Note]:
        if self.mode == "bypass":
            return self._check_bypass(match)
        if self.cache == "none":
            return []
        sizes = {region.name: bytes_per_sample(match.data[region.name], DTYPES[self.dtype]) for region in match.regions}
        if self.limit is not None and self.limit < min(sizes.values()):
            why = f"limit = {show_size(self.limit)} holds not even one sample's features ({show_size(min(sizes.values()))} at least)"
            return [Note("refuse", "limit", f"{why}. Raise it, or end the prefix later")]
        notes = []
        for name, size in sizes.items():
            shape = "x".join(map(str, match.data[name].meta["val"].shape[1:]))
            views = f" for each of {self.views} views" if self.views else ""
            notes.append(Note("info", name, f"a drop here keeps {shape} features: {show_size(size)} a sample in {self.dtype}{views}"))
        return notes

    def _check_bypass(self, match: Match) -> list[Note]:
        if not match.regions:
            name, reason = next(iter(match.data.items()))
            return [Note("refuse", name, f"no selected block can be bypassed: {reason}")]
        return [Note("skip", name, reason) for name, reason in match.data.items() if isinstance(reason, str)]

    # -- rewrite --------------------------------------------------------------------------------------------------------------------
    def rewrite(self, graph: Graph, match: Match) -> Effects:
        return self._bypass(graph, match) if self.mode == "bypass" else self._drop(graph, match)

    def _drop(self, graph: Graph, match: Match) -> Effects:
        last = match.regions[-1].name
        cut: fx.Node = match.data[last]
        figures: dict[str, Any] = cut_off(graph, [match.data[r.name] for r in match.regions], by=self.use)
        names = tuple(r.name for r in match.regions)
        marks = {name: Mark("dropped", detail={"upto": last}) for name in names}
        kept = self.keeps()
        if kept is None:
            return Effects(names, figures=figures, marks=marks)
        figures |= {"cut": last, "feature_bytes_per_sample": bytes_per_sample(cut, DTYPES[self.dtype])}
        return Effects(names, needs=Needs(features=FeatureCut(cut, last, kept)), figures=figures, marks=marks)

    def _bypass(self, graph: Graph, match: Match) -> Effects:
        # Probabilities follow the depth among all the pass's blocks, whichever of them a trigger has taken so far.
        depth = {name: i for i, name in enumerate((n for n, v in match.data.items() if not isinstance(v, str)), 1)}
        done, notes, zeros, left_out, marks = [], [], [], [], {}
        for region in match.regions:
            sums: tuple[Residual, ...] = match.data[region.name]
            if self.probability is None:
                affine = [last_affine(graph, residual) for residual in sums]
                if None in affine:
                    notes.append(Note("skip", region.name, "its branch does not end in weights: an export could not leave it out"))
                    continue
                zeros += [name for names in affine if names for name in names]
                left_out += sums
                self._freeze(graph, region)
                marks[region.name] = Mark("bypassed")
            else:
                probability = self.probability * depth[region.name] / len(depth)
                self._skip_at_random(graph, region, sums, probability)
                marks[region.name] = Mark("bypassed", detail={"probability": round(probability, 4)})
            done.append(region.name)
        # From the last on: what a later sum builds on is then still there.
        for residual in reversed(left_out):
            remove(graph, residual)
        return Effects(tuple(done), tuple(notes), restore=_with_zeros(tuple(zeros)) if zeros else None, marks=marks)

    def _freeze(self, graph: Graph, region: Region) -> None:
        """What only the branches read has nothing left to learn from."""
        for name in region.parameters:
            graph.module.get_parameter(name).requires_grad_(False)

    def _skip_at_random(self, graph: Graph, region: Region, sums: tuple[Residual, ...], probability: float) -> None:
        for residual in sums:
            shape = tuple(residual.trunk.meta["val"].shape[1:])

            def wrap(body: fx.GraphModule, shape: tuple[int, ...] = shape) -> StochasticBranch:
                return StochasticBranch(body, probability, shape)

            graph.add_section(Section(f"bypass_{region.name.replace('.', '_')}", residual.nodes, wrap, self.use))


def _with_zeros(names: tuple[str, ...]) -> Any:
    def restore(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {name: torch.zeros_like(state[name]) for name in names}

    return restore
