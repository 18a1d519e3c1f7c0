"""drop: a converged prefix leaves the training graph, forward and backward (Learn&Drop, arXiv 2604.23403).

Early layers converge long before late ones. Once a prefix has converged, it is run over the training set one last time, its output is
cached, and training continues on the cached features. The prefix's weights stay: evaluation and export use the whole network.

    [[pass]]
    use = "drop"
    when = { score = ["change", "continuation"], below = [0.05, 0.5], patience = 2, most = 0.8 }
    dtype = "float16"

    [[pass]]                              # a published trajectory, replayed
    use = "drop"
    when = [{ epoch = 3, upto = "layer1" }, { epoch = 5, upto = "layer2" }]

A prefix ends at a *cut point*, an activation that every path from input to output crosses. With a schedule those are the ends of the
parts it names; with a score, the ends of the backbone's blocks. What has been dropped stays as it is: its parameters do not train, its
norms use their running statistics, and its dropout is off, whatever `module.train()` says. In `plan.module` the prefix runs under
`no_grad`; `plan.suffix` is the remaining network, with the features as its input.

The runner caches the features in RAM or on disk. Where images are the same in every epoch, training on cached features is training on the
images. Under random augmentation it is not: then a quarter of the features is computed anew in each epoch (`refresh = 4`), in RAM; `views`
and `crops` are other ways. Where the features do not fit, or take longer to read than to compute, the prefix runs under `no_grad` instead,
which is slower and trains on images as they are augmented.

`mode = "bypass"` is the other way to leave blocks out: residual blocks that keep their input's shape are replaced by their shortcut,
for good, or in each training step with a probability (stochastic depth, arXiv 1603.09382: it grows linearly with depth, up to the full
probability in the deepest block; `when = { schedule = "progressive" }` is progressive layer dropping). Blocks that change the shape are
left alone. At random, the evaluated network is the backbone itself and the expectation of the trained one. For good, the evaluated
network is the one that was trained; in the export the bypassed branches end in zeros, so the backbone computes the same.

Refuses: a prefix that is not closed, that leaves nothing to train, or that shares a parameter with what comes after it; a selection in
which no block can be bypassed; overlap with freeze, share or another drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field, StrictBool

from graphopt import ActiveMatch, Effects, Filter, Match, Pass, PassError, RuntimeNeeds, Selector, Status
from graphopt.compiler.pass_base import Candidate, FeatureCut, Property
from graphopt.compiler.triggers import AtEpoch, LearningRate, Progressive, Start, Steps, rising_steps
from graphopt.units import Size, show_size

if TYPE_CHECKING:
    from torch.fx import Node

    from graphopt import Editor, Graph

#: epochs after which all features are new again, where nothing else is said
REFRESH = 4
_CACHE_OPTIONS = ("cache", "dtype", "limit", "views", "refresh", "crops", "folder", "force")
#: options that are valid in one mode only
_OPTIONS = {"prefix": ("upto", *_CACHE_OPTIONS), "bypass": ("select", "probability", "distribution", "per")}


class Drop(Pass):
    """Takes a prefix out of training, or blocks out of the network.

    Attributes:
        mode: "prefix" or "bypass".
        upto: prefix: the part it ends with, at the furthest; for `when = "start"` and `{ epoch = n }`, exactly.
        cache: prefix: where the features are cached: "ram" or "disk" (in the run's folder); "none" runs the prefix every time. Of several
            processes each caches a part, and they exchange what their batches need; no file system has to be shared.
        dtype: of the cached features: half the bytes, and half the reading, at about three digits (float16) or two (bfloat16); "int8": a
            quarter, with a scale per sample and channel; the run's record says how large the error is.
        limit: size of the largest cache ("8 GiB"), of all processes together; above it the prefix runs under no_grad instead. Default:
            what there is.
        views: with random augmentation: how many fixed views of each sample are cached; epochs use them in rotation.
        refresh: with random augmentation: cached features are computed anew every so many epochs, a part of them in each epoch (4: a
            quarter), from an image augmented as in that epoch. The cache is no larger than without augmentation. In RAM only; 4 is the
            default there, without views.
        crops: with random crops (`crop = "pad"`): maps of the padded images are cached, and each epoch takes other crops of them, by
            multiples of the prefix's stride. A flipped image has other features, so flips need views = 2 (half of them are flipped) or
            refresh. For prefixes that compute alike at every position, as convolutions do.
        folder: of a cache on disk, to keep it after the run or to put it on another disk; a spec that names one needs --trust.
        force: cache the features even if reading them is slower than computing them.
        select: bypass: the blocks; default: all of them.
        probability: bypass: of leaving the deepest block out of a training step; None leaves all of them out for good.
        distribution: bypass: "linear": the probability grows with the depth; "uniform": it is the same for all blocks.
        per: bypass: "batch": a block is left out for all samples of a step, which saves its cost; "sample": for each sample by itself,
            which regularises and saves nothing.
    """

    name: ClassVar[str] = "drop"
    claim: ClassVar[str | None] = "removed"
    conflicts_with: ClassVar[frozenset[str]] = frozenset({"frozen", "shared", "removed"})

    mode: Literal["prefix", "bypass"] = "prefix"
    upto: Annotated[str, Field(min_length=1)] | None = None
    cache: Literal["ram", "disk", "none"] = "ram"
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    limit: Size | None = None
    views: Annotated[int, Field(ge=1, strict=True)] | None = None
    refresh: Annotated[int, Field(ge=1, strict=True)] | None = None
    crops: StrictBool = False
    folder: str | None = None
    force: StrictBool = False
    select: Selector | None = None
    probability: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    distribution: Literal["linear", "uniform"] = "linear"
    per: Literal["batch", "sample"] = "batch"

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        other = "bypass" if self.mode == "prefix" else "prefix"
        wrong = [n for n in _OPTIONS[other] if n in self.model_fields_set and getattr(self, n) != type(self).model_fields[n].default]
        if wrong:
            raise ValueError(f"{' and '.join(wrong)}: only valid with mode = {other!r}")
        if self.folder is not None and self.cache != "disk":
            raise ValueError('folder: only valid with cache = "disk"')
        if self.crops and self.cache == "none":
            raise ValueError("crops are taken of cached features: they need a cache")
        if self.refresh is not None and (self.views is not None or self.cache != "ram"):
            raise ValueError('refresh: only valid with cache = "ram", and without views')
        if self.mode == "prefix" and isinstance(self.when, Steps) and self.upto is not None:
            raise ValueError("each step of the schedule has its own upto: leave the pass's out")
        if self.mode == "prefix" and isinstance(self.when, Start | AtEpoch) and self.upto is None:
            raise ValueError('say where the prefix ends: upto = "layer2"')
        if self.probability is None and (self.distribution, self.per) != ("linear", "batch"):
            raise ValueError("distribution and per are of blocks that are left out at random: give a probability")
        if isinstance(self.when, Progressive) and self.probability is None:
            raise ValueError("progressive layer dropping skips at random: give a probability")
        return self

    def preserved_properties(self) -> frozenset[Property]:
        """Without some blocks for good, another function is evaluated; else everything but training stays the same."""
        if self.mode == "bypass" and self.probability is None:
            return frozenset({"state-dict keys"})
        return frozenset({"eval output", "state-dict keys", "gradients of unselected parameters"})

    def match(self, graph: Graph) -> Match[Any]:
        return self._match_prefix(graph) if self.mode == "prefix" else self._match_bypass(graph)

    def rewrite(self, edit: Editor, match: ActiveMatch[Any]) -> Effects:
        return self._drop_prefix(edit, match) if self.mode == "prefix" else self._bypass(edit, match)

    def learning_rates(self, names: tuple[str, ...]) -> Mapping[str, LearningRate]:
        return self.when.learning_rates(names) if self.mode == "prefix" else {}

    def _match_prefix(self, graph: Graph) -> Match[dict[str, str]]:
        """Decides the node at which the prefix ends, for each part that a trigger can drop."""
        from graphopt.passes.drop.prefix import crops_of, parts_between
        from graphopt.runtime.quantized import stored_bytes

        cuts = self._cuts(graph)
        shapes = {name: tuple(cut.meta["val"].shape[1:]) for name, cut in cuts.items()}
        left_out: Mapping[str, str] = {}
        if self.crops:
            larger, left_out = crops_of(graph, cuts, named=self.upto is not None or isinstance(self.when, Steps))
            cuts, shapes = {name: cuts[name] for name in larger}, {name: found.shape for name, found in larger.items()}
        regions = parts_between(graph, cuts)
        match = Match(regions, {r.name: cuts[r.name].name for r in regions}, self._cache_options())
        for name, why in left_out.items():
            match.skip(name, why)
        if self.cache == "none":
            return match
        sizes = {r.name: stored_bytes(shapes[r.name], self.dtype) for r in regions}
        smallest = min(sizes.values())
        if self.limit is not None and self.limit < smallest:
            why = f"limit = {show_size(self.limit)} is smaller than one sample's features ({show_size(smallest)} at least)"
            match.refuse("limit", why, fix="Raise it, or end the prefix later")
        views = f" for each of {self.views} views" if self.views else ""
        for name, size in sizes.items():
            shape = "x".join(map(str, shapes[name]))
            match.note(name, f"a drop here caches {shape} features: {show_size(size)} per sample in {self.dtype}{views}")
        return match

    def _cache_options(self) -> dict[str, Any] | None:
        if self.cache == "none":
            return None
        options = {name: getattr(self, name) for name in _CACHE_OPTIONS}
        if self.cache == "ram" and not self.views and not self.refresh:
            options["refresh"] = REFRESH
        return options

    def _cuts(self, graph: Graph) -> dict[str, Node]:
        """Where this pass can cut, by name."""
        from graphopt.passes.drop.prefix import block_cuts, named_cut

        if isinstance(self.when, Steps):
            return {step.upto: named_cut(graph, step.upto) for step in self.when.steps}
        last = None if self.upto is None else {self.upto: named_cut(graph, self.upto)}
        if last is not None and isinstance(self.when, Start | AtEpoch):
            return last
        cuts = block_cuts(graph)
        if last is not None:
            (end,) = last.values()
            cuts = {name: cut for name, cut in cuts.items() if graph.order[cut] < graph.order[end]} | last
        if not cuts:
            fix = 'Name the parts instead: when = [{ epoch = 3, upto = "..." }] (graphopt inspect shows the cut points)'
            raise PassError("no block of this backbone ends at a cut point with something left to train after it", fix=fix)
        return cuts

    def _drop_prefix(self, edit: Editor, match: ActiveMatch[dict[str, str]]) -> Effects:
        from graphopt.ir.shifts import croppable
        from graphopt.passes.drop.prefix import check_cut, drop_prefix
        from graphopt.runtime.quantized import stored_bytes

        nodes = {n.name: n for n in edit.graph.nodes}
        cuts = [check_cut(edit.graph, nodes.get(match.decision[name]), name) for name in match.names]
        last = match.names[-1]
        effects = Effects(figures=dict(drop_prefix(edit, cuts)))
        for name in match.names:
            effects.mark(name, Status.DROPPED, upto=last)
        options = self._cache_options()
        if options is not None:
            features = FeatureCut(cuts[-1], last, options, croppable(edit.graph, cuts[-1]) if self.crops else None)
            effects.figures |= {"cut": last, "feature_bytes_per_sample": stored_bytes(features.shape, self.dtype)}
            effects.needs = RuntimeNeeds(features=features)
        return effects

    def _match_bypass(self, graph: Graph) -> Match[dict[str, float]]:
        """Decides which blocks are bypassed, and the probability of each where that is at random."""
        from graphopt.ir.patterns import residuals
        from graphopt.ir.select import select
        from graphopt.passes.drop.bypass import find_each, removal

        selected = select(Filter(blocks=True) if self.select is None else self.select, graph)
        match: Match[dict[str, float]] = Match(selected, {})
        found = find_each(residuals if self.probability else removal, match.regions, graph, match)
        match.regions = tuple(region for region in selected if region.name in found)
        if not match.regions:
            first = match.diagnostics[0]
            match.refuse(first.location, f"no selected block can be bypassed: {first.message}", fix="Select other blocks")
        if self.probability is not None:
            # It grows with the depth among all blocks of the pass, whichever of them a trigger has taken so far.
            shares = {name: depth / len(found) if self.distribution == "linear" else 1.0 for depth, name in enumerate(found, start=1)}
            match.decision = {name: self.probability * share for name, share in shares.items()}
        return match

    def _bypass(self, edit: Editor, match: ActiveMatch[dict[str, float]]) -> Effects:
        import torch

        from graphopt.ir.patterns import residuals
        from graphopt.passes.drop.bypass import find_each, removal, remove, skip_at_random, skip_samples

        effects = Effects()
        if self.probability is not None:
            for name, sums in find_each(residuals, match.regions, edit.graph, effects).items():
                probability = match.decision[name]
                for number, residual in enumerate(sums):
                    if self.per == "sample":
                        skip_samples(edit, f"bypass.{name.replace('.', '_')}_{number}", residual, probability)
                    else:
                        skip_at_random(edit, name, residual, probability)
                saved = probability if self.per == "batch" else 0.0
                effects.mark(name, Status.BYPASSED, skip_probability=saved, probability=round(probability, 4))
            return effects
        found = find_each(removal, match.regions, edit.graph, effects)
        module, before = edit.graph.module, self._read(edit.graph)
        # From the last on: the shortcut of a later sum can be an earlier sum.
        for residual in reversed([r for item in found.values() for r in item.residuals]):
            remove(edit, residual)
        read = self._read(edit.graph)
        names = dict.fromkeys(n for region in match.regions if region.name in found for n in region.parameters)
        # What only the branches read, such as a table of positions, is left out with them.
        names |= dict.fromkeys(n for n, p in module.named_parameters() if id(p) in before)
        edit.freeze(n for n in names if id(module.get_parameter(n)) not in read)
        for name in found:
            effects.mark(name, Status.BYPASSED)
        zeros = [name for item in found.values() for name in item.zeros]
        effects.to_original_state = lambda state: state | {name: torch.zeros_like(state[name]) for name in zeros}
        return effects

    @staticmethod
    def _read(graph: Graph) -> set[int]:
        """Identities of the parameters that the output depends on."""
        from graphopt.ir.flow import ancestors
        from graphopt.ir.nodes import parameters_read

        alive = ancestors([graph.output])
        return {id(p) for n in graph.nodes if n in alive for _, p in parameters_read(graph.module, n)}

    @classmethod
    def schedules(cls, graph: Graph, epochs: int) -> Iterable[Candidate]:
        from graphopt.ir.blocks import disjoint_parts
        from graphopt.ir.flow import cut_points

        cuts = set(cut_points(graph))
        names = [r.name for r in disjoint_parts(graph)[:-1] if r.parameters and r.exits and r.exits[-1] in cuts]
        for when in rising_steps(names, epochs):
            yield Candidate(f"drop up to {when.steps[-1].upto} from epoch {when.steps[0].epoch} on", cls(when=when))
