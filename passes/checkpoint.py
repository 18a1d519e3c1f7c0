"""checkpoint: regions save only their inputs, and run again when the backward pass needs their activations.

Activation checkpointing (Chen et al., arXiv 1604.06174), by `torch.utils.checkpoint` inside the emitted module. Gradients stay the same:
dropout draws the same masks again, and norms count every batch once (`torch.utils.checkpoint` alone moves their statistics twice).

While a segment runs again its activations are live, so the peak is about the inputs of all segments plus the activations of the largest.
The last one runs again only where that lowers the peak. With a budget, those runs of blocks, and those operations inside blocks, are
recomputed that meet it at the fewest FLOPs: norms, activations and concatenations first, whose results take memory and no FLOPs. A share
is one of the predicted peak of activations, a size is all that a step with this pass alone needs.

    [[pass]]
    use = "checkpoint"
    budget = 0.5    # or: budget = "8 GiB" with device = "L4"; segments = 4; segments = "every block"; select = ["layer1", "layer2"]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, Selector
from graphopt.compiler.pass_base import ALL_PROPERTIES, Candidate, Property
from graphopt.units import SizeText

if TYPE_CHECKING:
    from graphopt import Editor, Graph
    from graphopt.cost.rates import TimedStep
    from graphopt.cost.recomputation import Runs


class Checkpoint(Pass):
    """Recomputes activations in the backward pass instead of storing them.

    Attributes:
        select: regions to recompute, each a segment of its own; see selectors.
        segments: instead: the blocks in this many segments, with what lies between them; or "every block", each one by itself.
        balance: of segments: "memory" (default: the lowest predicted peak, where they can end at cut points), "blocks" (as many in each).
        budget: instead: a share of the peak of activations (0.5 is half of it), or what a step may need in all ("8 GiB").
        device: of a budget in bytes: the GPU whose allocator must hold the step (A100, H100, H200, RTX 4090, L4). Default: live bytes.
        fraction: of a budget in bytes: the share that meets it, found once for [train], then written beside it.
        when: from which epoch, until which.

    Preserves everything. Skips what other passes run without a backward pass; their sections divide its segments: put it after them.
    """

    name: ClassVar[str] = "checkpoint"
    preserves: ClassVar[frozenset[Property]] = ALL_PROPERTIES
    once: ClassVar[bool] = True
    position: ClassVar[Literal["first", "anywhere", "last"]] = "last"

    select: Selector | None = None
    segments: Annotated[int, Field(ge=1, strict=True)] | Literal["every block"] | None = None
    balance: Literal["memory", "blocks"] | None = None
    budget: Annotated[float, Field(gt=0, le=1, strict=True)] | SizeText | None = None
    device: str | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(given is not None for given in (self.select, self.segments, self.budget)) != 1:
            raise ValueError("give one of select (regions), segments (a number) and budget (a share of the activations, or a size)")
        if self.balance and not isinstance(self.segments, int):
            raise ValueError("balance divides the blocks into segments: it needs a number of segments")
        if not isinstance(self.budget, int) and (self.device or self.fraction):
            raise ValueError('device and fraction belong to a budget in bytes, such as "8 GiB"')
        return self

    @property
    def settled(self) -> bool:
        """Whether it follows from the graph alone; not a budget in bytes, until its fraction is written down."""
        return not isinstance(self.budget, int) or self.fraction is not None

    def settle(self, graph: Graph, step: TimedStep) -> Self:
        """With the fraction of a budget in bytes written down."""
        from graphopt.compiler.fitting import fraction_within

        if self.settled or not isinstance(self.budget, int):
            return self
        return self.model_copy(update={"fraction": fraction_within(graph, self, self.budget, step, self.device)})

    def match(self, graph: Graph) -> Match[Runs]:
        from graphopt.cost.recomputation import Run, in_segments, within
        from graphopt.ir.blocks import find_blocks
        from graphopt.ir.select import select

        if not self.settled:
            raise PassError("a budget in bytes depends on the step", fix="Settle the pass (graphopt.compile does), or give fraction")
        regions = find_blocks(graph) if self.select is None else select(self.select, graph)
        runs: Runs = tuple(Run((region.name,)) for region in regions)
        if self.segments is not None:
            runs = in_segments(graph, self.segments, by_memory=self.balance != "blocks")
        elif share := self.fraction or self.budget:
            runs = within(graph, share)
        match = Match(tuple(region for region in regions if any(region.name in run.blocks for run in runs)), runs)
        if not runs:
            match.skip("the backbone", "its activations are within the budget already")
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[Runs]) -> Effects:
        from graphopt.compiler.segments import recompute

        return recompute(edit, match.regions, match.decision)

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:
        """A few budgets, and every block by itself."""
        budgets = (Candidate(f"checkpoint, budget {share:g}", cls(budget=share)) for share in (0.8, 0.65, 0.5, 0.35))
        return (*budgets, Candidate("checkpoint, every block", cls(segments="every block")))
