"""What a whole run costs: the step's costs, phase by phase, times the steps of each phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.cost.errors import CostError
from graphopt.cost.figures import Cost

if TYPE_CHECKING:
    from graphopt.rewriting.plan import Plan
    from graphopt.rewriting.triggers import Decision


@dataclass(frozen=True)
class PhaseCost:
    """A stretch of epochs with one graph. `start` is its first epoch (from 0), `end` the first that is no longer in it."""

    start: int
    end: int
    steps: int
    decisions: tuple[Decision, ...]
    cost: Cost = field(repr=False)

    @property
    def flops(self) -> int:
        return self.steps * self.cost.flops


@dataclass(frozen=True)
class RunCost:
    """A run's costs; FLOPs are of training steps (evaluation aside), sums over all of them.

    Attributes:
        phases: in order, without gaps.
        baseline: the untouched backbone's step.
        forward_flops, backward_flops, flops: over the run. baseline_flops: what the untouched backbone would take.
        peak_bytes: the largest phase's.
        unforeseen: numbers of the passes (from 0) whose triggers wait for measurements, so that the figures leave them out.
        seconds: FLOPs over the rate that was given, or None. The rate of frozen, memory-bound or tiny steps is lower than that of a
            plain one, so this is optimistic for plans that save much.
    """

    phases: tuple[PhaseCost, ...]
    baseline: Cost
    unforeseen: tuple[int, ...] = ()
    seconds: float | None = None

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)

    @property
    def forward_flops(self) -> int:
        return sum(p.steps * p.cost.forward_flops for p in self.phases)

    @property
    def backward_flops(self) -> int:
        return sum(p.steps * p.cost.backward_flops for p in self.phases)

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def baseline_flops(self) -> int:
        return self.steps * self.baseline.flops

    @property
    def peak_bytes(self) -> int:
        return max(p.cost.peak_bytes for p in self.phases)

    @property
    def final(self) -> Cost:
        """The last phase's step: what the average over the run must not be mistaken for."""
        return self.phases[-1].cost

    def to_dict(self) -> dict[str, Any]:
        phases: list[Mapping[str, Any]] = [
            {"start": p.start, "end": p.end, "steps": p.steps, "flops": p.flops, "step": p.cost.to_dict()} for p in self.phases
        ]
        keys = ("steps", "forward_flops", "backward_flops", "flops", "baseline_flops", "peak_bytes", "seconds")
        return {**{k: getattr(self, k) for k in keys}, "unforeseen": list(self.unforeseen), "phases": phases}


def integrate(
    plan: Plan, epochs: int, steps_per_epoch: int, *, decisions: Iterable[Decision] | None = None, flops_per_second: float | None = None
) -> RunCost:
    """The integral of a plan's step costs over a run.

    Args:
        plan: in its first phase, compiled with costs.
        decisions: a recorded run's, to be replayed; by default what the triggers decide that need no measurement.
        flops_per_second: what the machine reaches on such steps, measured by the caller, for `seconds`.

    Raises:
        CostError: the plan was compiled without costs, or there is nothing to run.
    """
    if epochs < 1 or steps_per_epoch < 1:
        raise CostError(f"a run has at least one epoch of one step, found {epochs} epochs of {steps_per_epoch} steps")
    if plan.report.before is None or plan.report.after is None:
        raise CostError("the plan was compiled without costs", fix="graphopt.compile(..., costs=True)")
    replayed = None if decisions is None else tuple(decisions)
    taken: tuple[Decision, ...] = ()
    current, start = plan, 0
    phases: list[PhaseCost] = []
    for epoch in range(epochs):
        if replayed is None:
            due = tuple(d for d in current.due(epoch, None, epochs) if d not in taken)
        else:
            due = tuple(d for d in replayed if d.epoch == epoch)
        if not due:
            continue
        if epoch > start:
            phases.append(PhaseCost(start, epoch, (epoch - start) * steps_per_epoch, taken, _step(current)))
        taken, start = (*taken, *due), epoch
        current = plan.at(taken, verify="off", costs=True)
    phases.append(PhaseCost(start, epochs, (epochs - start) * steps_per_epoch, taken, _step(current)))
    waiting = () if replayed is not None else tuple(i for i, p in enumerate(plan.passes) if not p.when.foreseeable)
    flops = sum(p.flops for p in phases)
    return RunCost(tuple(phases), plan.report.before, waiting, flops / flops_per_second if flops_per_second else None)


def _step(plan: Plan) -> Cost:
    cost = plan.report.after
    if cost is None:
        raise CostError("the plan was compiled without costs", fix="Compile it with costs = True")
    return cost
