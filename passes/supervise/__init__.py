"""supervise: train a backbone as gradient-isolated modules, each with a loss of its own, so that memory falls with the largest module.

The graph is cut at K-1 points. Each module but the last gets an auxiliary classifier and a decoder that rebuilds the module's input. Its
backward runs right after its forward, so that its activations are gone before the next module starts. The last module trains on the
network's own output and criterion. No gradient crosses a cut.

From: *Local Learning on Transformers via Feature Reconstruction* (arXiv 2212.14215), which rebuilds the module's own input features.
`decoder = "image"` is InfoPro (ICLR 2021, openreview fAbkE6ant2), which rebuilds the image; `decoder = "none"` is plain greedy training.
Greedy modules keep only what separates classes at once. Three options let a module work for those that follow, without a decoder:

- `head = "ahead"` (AugLocal, ICLR 2024, openreview Qbf1hy8b7m) classifies through fresh copies of blocks from further on.
- `lookahead` (MAN, ECCV 2024; MAN++, arXiv 2507.16279) goes through the next block, by a running mean of its weights.
- `head = "dictionary"` (DCL, ICLR 2024, openreview Gg7cXo3S8l) has an embedding per class, and no auxiliary network at all.

    [[pass]]
    use = "supervise"
    modules = 4
    balance = "memory"

Preserves the eval output. Training needs the targets: `output, local_loss = module(x, target)`, with class indices (N,) or probabilities
(N, classes); the caller adds `local_loss` to its own criterion. Adds parameters under `supervise.<i>`, which export drops. Refuses
regions that the graph cannot be cut after, more modules than there are cuts for, decoders that cannot rebuild the input, and heads of
blocks that follow where none do. An image that leaves [0, 1] once `mean` and `std` are reverted is an error. `lookahead` follows weights of
the next module: `strategy = "modules"`, which trains that one in another process, sends them back after each step. On a CPU with glibc,
training lets the process hold up to 64 MiB of freed memory, so that a module reuses what the one before it freed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import pydantic
from pydantic import Field

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, RuntimeNeeds, SelectError, Status
from graphopt.compiler.pass_base import Candidate, Property
from graphopt.compiler.triggers import Start
from graphopt.passes.supervise.options import Difference, HeadKind, Lookahead, Structure, Weighting
from graphopt.units import Size

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from graphopt import Editor, Graph
    from graphopt.cost.partition import Table
    from graphopt.cost.rates import TimedStep
    from graphopt.ir.partition import CutCandidate
    from graphopt.passes.supervise.building import Builder

Statistics = tuple[float, ...]


class Cut(NamedTuple):
    """A cut that was decided: the name of the module that ends there, of the node, and a label to find it by if the node is gone."""

    module: str
    node: str
    label: str


class Supervise(Pass):
    """Gradient-isolated modules with local losses; the module docstring explains each option.

    Attributes:
        modules: number of modules (K), the last one included.
        balance: how the cuts are chosen: "blocks" (as many blocks in each module), "memory" (the lowest predicted peak of a step, heads
            and decoders included; without `modules`, as many as bring it within 10 % of the lowest), "stage" (where the resolution
            changes; without `modules`, at every stage), "time" (the slowest module's step as fast as can be, by rates measured on the
            machine, for the batch, optimizer and amp of [train]; measured once: the cuts are then written beside it, and stay).
        limit: of balance = "time": the most that a process with one module may hold in a step ("2 GiB"), forecast.
        cuts: instead: regions to cut after, `["layers.0", "layers.1"]`, or the names of cuts that a report or an error lists.
        decoder: "features" (rebuilds the module's own input), "image" (the network's input, InfoPro), "none" (greedy).
        structure: of the features decoder: "linear" (default; each position predicts the patch of the input at its place; for wide
            features by a map of rank 64), "pointwise" (by a small MLP), "conv" (upsampling and two convolutions), "transformer" (a
            block over the sampled positions first).
        fraction: fraction of spatial rows reconstructed per step; rows rotate so that all are covered. Default 0.125, for images 1.
        loss: of the decoder: "l1" (default), "l2", "bce" (default for images; what is rebuilt must lie in [0, 1]).
        head: "pool" (default: mean over positions, norm, linear), "norm-pool" (norm first, as published for transformers), "conv"
            (InfoPro's), "contrast" (supervised contrast of 128 features instead of class scores; within the micro-batch of one process,
            so it depends on their number), "dictionary" (mean similarity of positions with one embedding per class, DCL), "ahead" (fresh
            blocks shaped like some of those that follow, AugLocal; see depth).
        temperature: divides the similarities of "contrast" (default 0.07) and "dictionary" (1).
        depth: how many blocks an "ahead" head has, drawn evenly from those that follow, the last one included.
        taper: of "ahead": the depth falls linearly, in the last auxiliary module to `depth * (1 - taper) + taper`.
        lookahead: `{ blocks = 1, ema = 0.995, bias = "scale" }`: before head and decoder, the next module's first blocks, with a running
            mean of their weights, beside a copy that trains: bias = "block" (MAN), "scale" (default, MAN++), "none".
        weights: of the two losses, from the first to the last auxiliary module, linear between: `{ reconstruct = [1.0, 0.1],
            classify = [0.1, 1.0] }`. Default: classify 1, reconstruct 0.1 for features and 1 for the image.
        mean, std: the data's normalisation per channel, which the image decoder reverts. Default: ImageNet's for 3 channels, else 0.5.
        classes: number of classes of the targets. Default: the width of the network's output.
        when: from which epoch, until which.
    """

    name: ClassVar[str] = "supervise"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output"})
    claim: ClassVar[str | None] = "locally supervised"
    once: ClassVar[bool] = True
    position: ClassVar[Literal["first", "anywhere", "last"]] = "first"

    modules: Annotated[int, Field(ge=2, strict=True)] | None = None
    balance: Literal["blocks", "memory", "stage", "time"] = "blocks"
    limit: Size | None = None
    cuts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    decoder: Literal["features", "image", "none"] = "features"
    structure: Structure = "linear"
    fraction: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    loss: Difference | None = None
    head: HeadKind = "pool"
    temperature: Annotated[float, Field(ge=1e-3, le=1e3, strict=True)] | None = None
    depth: Annotated[int, Field(ge=1, strict=True)] = 2
    taper: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5
    lookahead: Lookahead | None = None
    weights: Weighting = Weighting()
    mean: Statistics | None = None
    std: Statistics | None = None
    classes: Annotated[int, Field(ge=1, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.limit is not None and self.balance != "time":
            raise ValueError('limit bounds the modules of balance = "time"')
        if self.balance == "time":
            if self.modules is None:
                raise ValueError('balance = "time" needs modules = K')
            if self.cuts is not None and len(self.cuts) != self.modules - 1:
                raise ValueError(f"modules = {self.modules} has {self.modules - 1} cuts; leave out cuts to have them chosen again")
        elif self.cuts is not None and (self.modules is not None or self.balance != "blocks"):
            raise ValueError("cuts gives the cuts; leave out modules and balance")
        if self.cuts is None and self.modules is None and self.balance == "blocks":
            raise ValueError('give modules = K, or cuts = [...], or balance = "memory" or "stage"')
        if self.cuts is not None and len(set(self.cuts)) < len(self.cuts):
            raise ValueError("cuts names a region twice")
        if self.decoder == "none" and max(self.weights.classify) == 0:
            raise ValueError("without a decoder, the classify weights must not be 0")
        return self

    def match(self, graph: Graph) -> Match[tuple[Cut, ...]]:
        """Chooses the cuts; the regions are the auxiliary modules (all but the last)."""
        from graphopt.ir.nodes import parameters_of
        from graphopt.ir.regions import Region
        from graphopt.passes.supervise.local import nodes_between

        builder = self._builder(graph)
        _ = builder.classes  # a PassError here, not in the rewrite
        regions, cuts, start = [], [], graph.placeholder
        for number, candidate in enumerate(self.choose_cuts(graph), start=1):
            end = candidate.node
            nodes = nodes_between(graph, start if number > 1 else None, end)
            name = f"module {number} (to {candidate.label})"
            regions.append(Region(name, (), "local module", nodes, (start,), (end,), True, parameters_of(graph, nodes)))
            cuts.append(Cut(name, end.name, candidate.label))
            start = end
        match = Match(tuple(regions), tuple(cuts))
        for region in regions:
            source, goal = builder.layouts(region.entries[0], region.exits[0])
            problem = builder.incompatibility(region.exits[0].name, source, goal)
            if problem is not None:
                fix = 'Use structure = "linear"' if self.structure == "conv" else "Cut elsewhere, or leave it out"
                match.refuse(region.name, problem, fix)
            match.note(region.name, f"{len(region.parameters)} parameter tensors; its output is {source}")
        if self.balance == "time":
            match.note("cuts", "they were chosen by seconds measured on a machine; cuts = [...] in the spec or in Python keeps them")
        channels = graph.placeholder.meta["val"].shape[1]
        for option, values in (("mean", self.mean), ("std", self.std)):
            if self.decoder == "image" and values is not None and len(values) != channels:
                match.refuse(option, f"the image has {channels} channels, {option} has {len(values)} values")
        return match

    @property
    def settled(self) -> bool:
        """Whether the cuts follow from the graph alone; not those by time, until they are written down."""
        return self.balance != "time" or self.cuts is not None

    def settle(self, graph: Graph, step: TimedStep) -> Self:
        """With the cuts by time written down."""
        from graphopt.cost.partition import by_largest
        from graphopt.ir.partition import cut_candidates, require_parts
        from graphopt.passes.supervise.balance import predicted_seconds

        if self.settled:
            return self
        assert self.modules is not None
        candidates = cut_candidates(graph)
        require_parts(candidates, self.modules)
        table = predicted_seconds(graph, self._builder(graph), step, limit=self.limit, modules=self.modules)
        return self.model_copy(update={"cuts": tuple(c.label for c in by_largest(candidates, table, self.modules))})

    def choose_cuts(self, graph: Graph) -> tuple[CutCandidate, ...]:
        """Where it cuts a graph that nothing has changed. A PassError says where it can be cut, if not as the options want it."""
        from graphopt.cost.partition import by_largest
        from graphopt.ir.partition import by_stage, cut_candidates, evenly, explicit

        if not self.settled:
            raise PassError('balance = "time" depends on the machine', fix="Settle the pass (graphopt.compile does), or give cuts")
        candidates = cut_candidates(graph)
        if self.cuts is not None:
            return explicit(graph, candidates, self.cuts)
        if self.balance == "stage":
            return by_stage(graph, candidates, self.modules)
        if self.balance == "memory":
            return by_largest(candidates, self.peaks(graph), self.modules)
        assert self.modules is not None
        return evenly(graph, candidates, self.modules)

    def peaks(self, graph: Graph) -> Table:
        """The predicted peak of each module between two cut candidates; measured once for all numbers of modules."""
        alike = self.model_copy(update={"modules": None, "balance": "memory", "limit": None, "cuts": None, "when": Start()})
        return graph.cached(_Peaks(alike))

    def _builder(self, graph: Graph) -> Builder:
        from graphopt.passes.supervise.building import Builder

        return Builder(self, graph)

    def rewrite(self, edit: Editor, match: ActiveMatch[tuple[Cut, ...]]) -> Effects:
        from graphopt.passes.supervise.auxiliary import Boundary
        from graphopt.passes.supervise.local import BOUNDARY, INPUT, Span, is_number

        graph, effects = edit.graph, Effects(needs=RuntimeNeeds(targets=True), to_original_state=_without_auxiliary)
        if (other := next((s.author for s in graph.sections if s.target), None)) is not None:
            what, fix = (
                f"{other} divides the backbone into local modules already",
                "Use one at a time: end one where the other begins (until)",
            )
            raise PassError(what, fix=fix)
        cuts = [cut for cut in match.decision if cut.module in match.names]
        ends = [_resolve(graph, cut) for cut in cuts]
        builder = self._builder(graph)
        layouts = [builder.layouts(start, end) for start, end in zip([graph.placeholder, *ends], ends, strict=False)]
        graph.placeholder.meta[BOUNDARY] = INPUT
        for i, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
            auxiliary = builder.initialized(i, len(cuts), cut.node, *layouts[i])
            edit.add_module(f"supervise.{i}", auxiliary)
            path = f"supervise.{i}.boundary"
            boundary = edit.call_module(path, Boundary(), (end,), after=end, like=graph.placeholder)
            boundary.meta[BOUNDARY] = path
            # Shapes are read before the boundary still, so that sections of earlier passes that hold both stay convex.
            edit.redirect(end, boundary, [user for user in end.users if not is_number(user)])
            effects.mark(cut.module, Status.ISOLATED)
            head = "none" if auxiliary.head is None else self.head
            decoder = f"features, {self.structure}" if self.decoder == "features" else self.decoder
            decoder = "none" if auxiliary.decoder is None else decoder
            weights = f"classify {auxiliary.weights.classify:g}, reconstruct {auxiliary.weights.reconstruct:g}"
            origin = end.meta["origin"].path
            effects.mark(f"supervise.{i}", Status.INSERTED, sources=(origin,), head=head, decoder=decoder, weights=weights)
        for i in range(len(cuts)):
            span = Span(graph, i)
            edit.outline(span.nodes(), span, f"supervise_{i}", target=True, image=span.auxiliary.rebuilds_image)
        sizes = [p.numel() for n, p in graph.module.named_parameters() if n.startswith("supervise.")]
        effects.note("supervise", f"{len(sizes)} auxiliary parameter tensors, dropped at export")
        effects.figures |= {"cuts": [c.label for c in match.decision], "modules": len(cuts) + 1, "auxiliary_parameters": sum(sizes)}
        return effects

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:
        """A few numbers of modules, balanced by memory, with the other options of the spec's own pass."""
        from graphopt.ir.flow import cut_points

        chosen = ("use", "modules", "balance", "limit", "cuts")
        others = {key: value for key, value in current.table().items() if key not in chosen} if current else {}
        for count in (2, 3, 4, 6, 8):
            if count <= len(cut_points(graph)):
                yield Candidate(f"supervise, {count} modules", cls.model_validate({**others, "modules": count, "balance": "memory"}))


@dataclass(frozen=True)
class _Peaks:
    """The analysis behind `Supervise.peaks`; equal for passes that would predict the same."""

    value: Supervise

    def __call__(self, graph: Graph) -> Table:
        from graphopt.passes.supervise.balance import predicted_peaks

        return predicted_peaks(graph, self.value._builder(graph))


def _resolve(graph: Graph, cut: Cut) -> Node:
    """The node of a cut in a graph that earlier passes may have changed."""
    from torch import Tensor

    from graphopt.ir.partition import named_region

    named = [n for n in graph.nodes if n.name == cut.node and isinstance(n.meta.get("val"), Tensor)]
    with suppress(SelectError):
        ends = named or named_region(graph, cut.label).exits
        if len(ends) == 1:
            return ends[0]
    raise PassError(f"another pass removed the cut after {cut.label!r}", fix="Cut elsewhere (cuts = [...]), or put supervise first")


def _without_auxiliary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("supervise.")}
