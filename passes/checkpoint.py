"""checkpoint: parts of the backbone keep only their inputs, and run again when the backward needs what they saved.

Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), by `torch.utils.checkpoint`
inside the emitted module. Gradients stay the same; a checkpointed stretch runs its forward twice, so a whole backbone costs about a third
more compute. It is the rival that freezing, dropping and local supervision must beat.

What it saves is everything between a stretch's input and its output; what it keeps is the input. While one stretch is run again its
activations live, so the peak is about the inputs of all stretches plus the activations of the largest one: the square root of the number
of blocks is a good number of segments. The last stretch runs again at once and gains nothing.

Random state is kept, so dropout draws the same masks again. Norms count every batch once: their running statistics move in the forward
and stay put when it is run again (`torch.utils.checkpoint` alone moves them twice).

    [[pass]]
    use = "checkpoint"
    segments = 4                      # or: select = ["layer1", "layer2"], each region a stretch of its own
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from pydantic import Field
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from graphopt.errors import PassError
from graphopt.regions import Region, activations
from graphopt.rewriting import Effects, Mark, Match, Note, Pass
from graphopt.rewriting.passes import Property
from graphopt.rewriting.sections import Body, NoGrad, Section
from graphopt.select import Selector, select
from graphopt.trace import Graph


class Checkpoint(Pass):
    """Runs stretches of the backbone again in the backward instead of keeping their activations.

    Attributes:
        select: regions, each a stretch of its own; see selectors.
        segments: instead: the natural blocks in this many stretches of (nearly) equal counts, with what lies between them.
        when: from which epoch, until which.

    Preserves everything: eval and training output, keys, and all gradients.
    Skips: what other passes run without a backward anyway. A stretch that another pass's section divides is divided likewise, so let
    checkpoint stand after such passes.
    """

    use: ClassVar[str] = "checkpoint"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "training output", "state-dict keys", "gradients of the rest"})

    select: Selector | None = None
    segments: Annotated[int, Field(ge=1, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> Checkpoint:
        if (self.select is None) == (self.segments is None):
            raise ValueError("give either select (regions) or segments (a number of equal stretches)")
        return self

    def match(self, graph: Graph) -> Match:
        return Match(graph.blocks() if self.select is None else select(self.select, graph))

    def check(self, graph: Graph, match: Match) -> list[Note]:
        if self.segments is not None and self.segments > len(match.regions):
            why = f"segments = {self.segments}, but there are {len(match.regions)} blocks to divide. Ask for at most that many"
            return [Note("refuse", "the backbone", why)]
        active = activations(graph)
        idle = [r.name for r in match.regions if not active & set(r.nodes)]
        return [Note("skip", name, "it computes no activations: nothing to run again") for name in idle]

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        active = activations(graph)
        stretches = [(r,) for r in match.regions] if self.segments is None else _evenly(match.regions, self.segments)
        notes, marks = [], {}
        count = 0
        for regions in stretches:
            pieces = _pieces(graph, _stretch(graph, regions, whole=self.segments is not None))
            pieces = [piece for piece in pieces if active & set(piece)]
            if not pieces:
                idle = [r.name for r in regions if active & set(r.nodes)]
                notes += [Note("skip", name, "it runs without a backward already: nothing is saved there") for name in idle]
                continue
            for piece in pieces:
                count += 1
                graph.add_section(Section(f"{self.use}_{count}", piece, Checkpointed, self.use))
            marks.update({r.name: Mark("checkpointed") for r in regions})
        if not count and not notes:
            raise PassError("nothing that is selected computes activations")
        return Effects(tuple(marks), tuple(notes), figures={"stretches": count}, marks=marks)


def _evenly(regions: Sequence[Region], count: int) -> list[tuple[Region, ...]]:
    edges = [round(i * len(regions) / count) for i in range(count + 1)]
    return [tuple(regions[a:b]) for a, b in itertools.pairwise(edges)]


def _stretch(graph: Graph, regions: Sequence[Region], *, whole: bool) -> list[fx.Node]:
    """The nodes that run as one: a region's own, or everything from the first block's first node to the last one's last."""
    if not whole:
        return list(regions[0].nodes)
    # A slice of an execution order has no way out and back in.
    nodes = graph.nodes
    order = {n: i for i, n in enumerate(nodes)}
    places = [order[n] for r in regions for n in r.nodes]
    return [n for n in nodes[min(places) : max(places) + 1] if n.op not in ("placeholder", "output")]


def _pieces(graph: Graph, nodes: Sequence[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """The nodes by the sections they lie in, so that sections nest. Those that lie in a section without a backward are left out."""
    pieces: dict[frozenset[int], list[fx.Node]] = {}
    chosen = set(nodes)
    for node in nodes:
        # A section that lies wholly inside the stretch nests in it and divides nothing.
        holders = [i for i, s in enumerate(graph.sections) if node in s.nodes and not set(s.nodes) <= chosen]
        if not any(graph.sections[i].wrap is NoGrad for i in holders):
            pieces.setdefault(frozenset(holders), []).append(node)
    for section in graph.sections:
        if section.wrap is NoGrad and set(section.nodes) <= chosen:
            pieces = {key: [n for n in piece if n not in section.nodes] for key, piece in pieces.items()}
    return [tuple(piece) for piece in pieces.values() if piece]


class Checkpointed(nn.Module):
    """Runs a section under `torch.utils.checkpoint` when it trains, plainly otherwise."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.body(*inputs)
        # A compiled forward is run again by the compiler, which does not repeat its effects on buffers.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": self._contexts}
        return checkpoint(self.body.module, *inputs, use_reentrant=False, **contexts)

    def _contexts(self) -> tuple[Any, Any]:
        return nullcontext(), self._statistics_put()

    @contextmanager
    def _statistics_put(self) -> Iterator[None]:
        """Norms with running statistics move copies of them meanwhile."""
        norms = [m for m in self.body.module.modules() if m.training and isinstance(m._buffers.get("running_mean"), torch.Tensor)]
        kept = [dict(m._buffers) for m in norms]
        try:
            for module in norms:
                module._buffers.update({k: b if b is None else b.clone() for k, b in module._buffers.items()})
            yield
        finally:
            for module, buffers in zip(norms, kept, strict=True):
                module._buffers.update(buffers)
