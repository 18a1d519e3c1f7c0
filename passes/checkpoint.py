"""checkpoint: regions keep only their inputs, and run again when the backward pass needs their activations.

Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), by `torch.utils.checkpoint`
inside the emitted module. Gradients stay the same; a checkpointed segment runs its forward twice, so a whole backbone costs about a third
more compute. It is the baseline that freezing, dropping and local supervision are compared with.

What it saves is everything between a segment's input and its output; the input is kept. While a segment runs again its activations are
live, so the peak is about the inputs of all segments plus the activations of the largest one: the square root of the number of blocks is
a good number of segments. The last segment runs again at once and gains nothing.

The random state is kept, so dropout draws the same masks again. Norms count every batch once: their running statistics move in the
forward and stay put when it runs again (`torch.utils.checkpoint` alone moves them twice).

    [[pass]]
    use = "checkpoint"
    segments = 4                      # or: select = ["layer1", "layer2"], each region a segment of its own
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Self

import pydantic
from pydantic import Field
from torch.fx import Node

from graphopt import ActiveMatch, Editor, Effects, Graph, Match, Pass, PassError, Region, Selector, Status, select
from graphopt.compiler.pass_base import Candidate
from graphopt.compiler.verify import ALL_PROPERTIES, Property
from graphopt.ir.blocks import find_blocks
from graphopt.ir.nodes import activations
from graphopt.runtime.body import NoGrad
from graphopt.runtime.checkpointed import Checkpointed


class Checkpoint(Pass):
    """Recomputes activations in the backward pass instead of storing them.

    Attributes:
        select: regions to recompute, each a segment of its own; see selectors.
        segments: instead: the natural blocks in this many segments of (nearly) equal counts, with what lies between them.
        when: from which epoch, until which.

    Preserves everything: eval and training output, keys, and all gradients.
    Skips what other passes run without a backward pass anyway. A segment that a section of another pass divides is divided likewise, so
    let checkpoint stand after such passes.
    """

    name: ClassVar[str] = "checkpoint"
    preserves: ClassVar[frozenset[Property]] = ALL_PROPERTIES
    once: ClassVar[bool] = True

    select: Selector | None = None
    segments: Annotated[int, Field(ge=1, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.select is None) == (self.segments is None):
            raise ValueError("give either select (regions) or segments (a number of equal segments)")
        return self

    def match(self, graph: Graph) -> Match[None]:
        match: Match[None] = Match(find_blocks(graph) if self.select is None else select(self.select, graph))
        if self.segments is not None and self.segments > len(match.regions):
            why = f"segments = {self.segments}, but there are {len(match.regions)} blocks to divide"
            match.refuse("the backbone", why, fix=f"Use at most {len(match.regions)}")
        active = activations(graph)
        for region in match.regions:
            if not active & set(region.nodes):
                match.skip(region.name, "it computes no activations: there is nothing to recompute")
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        active = activations(edit.graph)  # outlining changes no node
        count = 0
        for regions in [(r,) for r in match.regions] if self.segments is None else _evenly(match.regions, self.segments):
            nodes = regions[0].nodes if self.segments is None else _from_first_to_last(edit.graph, regions)
            sections = edit.outline(nodes, Checkpointed, f"checkpoint_{count + 1}", outside=NoGrad, only=lambda p: bool(active & set(p)))
            count += len(sections)
            for region in regions:
                if sections:
                    effects.mark(region.name, Status.CHECKPOINTED)
                elif active & set(region.nodes):
                    effects.skip(region.name, "it runs without a backward pass already: nothing is saved there")
        if not count and not effects.diagnostics:
            raise PassError("nothing that is selected computes activations")
        effects.figures["segments"] = count
        return effects

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:
        blocks = len(find_blocks(graph))
        counts = sorted({k for k in (2, 4, round(blocks**0.5), blocks // 2, blocks) if 2 <= k <= blocks})
        return (Candidate(f"checkpoint, {k} segments", cls(segments=k)) for k in counts)


def _evenly(regions: Sequence[Region], count: int) -> list[tuple[Region, ...]]:
    edges = [round(i * len(regions) / count) for i in range(count + 1)]
    return [tuple(regions[a:b]) for a, b in itertools.pairwise(edges) if a < b]


def _from_first_to_last(graph: Graph, regions: Sequence[Region]) -> list[Node]:
    """Everything from the first region's first node to the last one's last: a slice of an execution order is convex."""
    places = [graph.order[n] for r in regions for n in r.nodes]
    return [n for n in graph.nodes[min(places) : max(places) + 1] if n.op not in ("placeholder", "output")]
