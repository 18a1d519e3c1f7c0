"""checkpoint: regions save only their inputs, and run again when the backward pass needs their activations.

Activation checkpointing (Chen et al., arXiv 1604.06174), by `torch.utils.checkpoint` inside the emitted module. Gradients stay the same; a
segment runs its forward twice, so a whole backbone costs about a third more compute. The other passes are compared with it.

A segment stores its input only. While it runs again its activations are live, so the peak is about the inputs of all segments plus the
activations of the largest one: the square root of the number of blocks is a good number of segments. The last one gains nothing.
The random state is restored, so dropout draws the same masks again. Norms count every batch once: their running statistics move in the
forward and stay put when it runs again (`torch.utils.checkpoint` alone moves them twice).

With a budget, blocks that need not run again keep their activations: the runs of blocks that do are chosen so that the predicted peak of
activations is at most that share of the plain one, at the fewest FLOPs (see `graphopt.cost.recomputation`). Parameters, gradients and
optimizer state come on top of it.

    [[pass]]
    use = "checkpoint"
    segments = 4    # or: segments = "every block"; budget = 0.5; select = ["layer1", "layer2"], each region a segment of its own
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, Selector, Status
from graphopt.compiler.pass_base import ALL_PROPERTIES, Candidate, Property

if TYPE_CHECKING:
    from torch.fx import Node

    from graphopt import Editor, Graph, Region


class Checkpoint(Pass):
    """Recomputes activations in the backward pass instead of storing them.

    Attributes:
        select: regions to recompute, each a segment of its own; see selectors.
        segments: instead: the natural blocks in this many segments, with what lies between them; or "every block", each one by itself.
        budget: instead: a share of the peak of activations, to be met at the fewest FLOPs: 0.5 is half of it.
        balance: of the segments: "blocks" (as many in each), "memory" (the lowest predicted peak of a step).
        when: from which epoch, until which.

    Preserves everything: eval and training output, keys, and all gradients. Skips what other passes run without a backward pass. A segment
    that a section of another pass divides is divided likewise, so put checkpoint after such passes.
    """

    name: ClassVar[str] = "checkpoint"
    preserves: ClassVar[frozenset[Property]] = ALL_PROPERTIES
    once: ClassVar[bool] = True
    position: ClassVar[Literal["first", "anywhere", "last"]] = "last"

    select: Selector | None = None
    segments: Annotated[int, Field(ge=1, strict=True)] | Literal["every block"] | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    balance: Literal["blocks", "memory"] = "blocks"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(given is not None for given in (self.select, self.segments, self.budget)) != 1:
            raise ValueError("give one of select (regions), segments (a number of segments) and budget (a share of the activations)")
        if not isinstance(self.segments, int) and self.balance != "blocks":
            raise ValueError("balance divides the blocks into segments: it needs a number of segments")
        return self

    def match(self, graph: Graph) -> Match[tuple[str, ...]]:
        from graphopt.cost.partition import recomputed_by_memory
        from graphopt.ir.blocks import find_blocks
        from graphopt.ir.nodes import activations
        from graphopt.ir.select import select

        match: Match[tuple[str, ...]] = Match(find_blocks(graph) if self.select is None else select(self.select, graph))
        if self.budget is not None:
            self._within_budget(graph, match, self.budget)
        elif isinstance(self.segments, int) and self.segments > len(match.regions):
            why = f"segments = {self.segments}, but there are {len(match.regions)} blocks to divide"
            match.refuse("the backbone", why, fix=f"Use at most {len(match.regions)}")
        elif isinstance(self.segments, int) and self.balance == "memory":
            match.decision = recomputed_by_memory(graph, match.regions, self.segments)
        for region in match.regions:
            if activations(graph).isdisjoint(region.nodes):
                match.skip(region.name, "it computes no activations: there is nothing to recompute")
        return match

    def _within_budget(self, graph: Graph, match: Match[tuple[str, ...]], budget: float) -> None:
        """Leaves the regions of the runs to recompute; the decision is the last block of each run."""
        from graphopt.cost.recomputation import recomputed_within

        runs = recomputed_within(graph, match.regions, budget)
        chosen = {name for run in runs for name in run}
        match.regions = tuple(region for region in match.regions if region.name in chosen)
        match.decision = tuple(run[-1] for run in runs)
        if not runs:
            match.skip("the backbone", "its activations are within the budget already")

    def rewrite(self, edit: Editor, match: ActiveMatch[tuple[str, ...] | None]) -> Effects:
        from graphopt.ir.flow import slice_around
        from graphopt.ir.nodes import activations
        from graphopt.runtime.body import Checkpointed, NoGrad

        effects, count, active = Effects(), 0, activations(edit.graph)
        for regions in self._segments(match.regions, match.decision):
            nodes = (
                regions[0].nodes
                if len(regions) == 1 and not isinstance(self.segments, int)
                else slice_around(edit.graph, (n for r in regions for n in r.nodes))
            )
            repeatable = _repeatable(edit, nodes)
            if repeatable is None:
                for region in regions:
                    effects.skip(region.name, "its input is overwritten in place where others read it: it cannot run from it again")
                continue
            nodes = repeatable
            name = f"checkpoint_{count + 1}"
            sections = edit.outline(nodes, Checkpointed, name, outside=NoGrad, only=lambda piece: not active.isdisjoint(piece))
            count += len(sections)
            for region in regions:
                if sections:
                    effects.mark(region.name, Status.CHECKPOINTED)
                elif not active.isdisjoint(region.nodes):
                    effects.skip(region.name, "it runs without a backward pass already: nothing is saved there")
        if not count and not effects.diagnostics:
            raise PassError("nothing that is selected computes activations")
        effects.figures["segments"] = count
        return effects

    def _segments(self, regions: Sequence[Region], ends: tuple[str, ...] | None) -> list[Sequence[Region]]:
        if not isinstance(self.segments, int) and self.budget is None:
            return [(r,) for r in regions]
        if ends is None:
            assert isinstance(self.segments, int)
            edges = [round(i * len(regions) / self.segments) for i in range(self.segments + 1)]
        else:
            edges = [0, *(i for i, r in enumerate(regions, start=1) if r.name in ends), len(regions)]
        return [regions[a:b] for a, b in itertools.pairwise(edges) if a < b]

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:  # it has no other options to take over
        """A few budgets, and a few numbers of segments, the square root of the number of blocks among them."""
        from graphopt.ir.blocks import find_blocks

        blocks = len(find_blocks(graph))
        counts = sorted({k for k in (2, 4, round(blocks**0.5), blocks // 2, blocks) if 2 <= k <= blocks})
        budgets = [Candidate(f"checkpoint, budget {share:g}", cls(budget=share)) for share in (0.7, 0.5)]
        return (*budgets, *(Candidate(f"checkpoint, {k} segments", cls(segments=k)) for k in counts))


def _repeatable(edit: Editor, nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """Nodes that find their inputs as they were when they run again: what writes into one in place writes into a copy of it.

    Returns None where that would be seen, or where what follows overwrites an input.
    """
    from graphopt.ir.nodes import can_leave_its_input, storages, writes_in_place

    graph, inside, order = edit.graph, set(nodes), dict(edit.graph.order)
    memory = {n: storages(n) for n in order}
    inputs = {i for n in nodes for i in n.all_input_nodes if i not in inside and i.op != "get_attr"}
    held = set[Any]().union(*(memory[i] for i in inputs))
    first = min(order[n] for n in nodes)
    writers: list[Node] = []
    for node in graph.nodes[first:]:
        written = memory[node.all_input_nodes[0]] & held if node.all_input_nodes and writes_in_place(graph.module, node) else set()
        if not written:
            continue
        if node not in inside or not can_leave_its_input(node, order, memory):
            return None
        writers.append(node)
        held -= written  # what is written later is the copy
    copies = []
    for node in writers:
        source = node.all_input_nodes[0]
        later = [u for u in source.users if order[u] > order[node]]
        copies.append(edit.call("clone", (source,), before=node))
        edit.redirect(source, copies[-1], [node])
        edit.redirect(source, node, later)
        order[copies[-1]] = order[node]
    return (*nodes, *copies)
