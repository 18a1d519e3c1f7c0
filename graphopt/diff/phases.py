"""A plan's phases, each as a diff: those that the spec alone implies, or those that a run went through."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.diff.align import Diff, align
from graphopt.diff.view import backbone_view, plan_view
from graphopt.spec import TrainSpec
from graphopt.train.assignment import runs_of
from graphopt.train.modules import check_modules

#: with more phases than this, costs are worked out for the first and the last only (a step is forecast for each)
COSTED = 12


@dataclass(frozen=True)
class PhaseDiff:
    """One phase: when it starts, in epochs, what was decided then, and the diff of the backbone and that phase."""

    epoch: float
    label: str
    diff: Diff


def phase_diffs(
    plan: Plan, decisions: Sequence[Decision] | None = None, *, epochs: int | None = None, ranks: int | None = None
) -> tuple[PhaseDiff, ...]:
    """One diff per phase, the first at epoch 0; a plan whose passes all act from the start has one.

    Args:
        plan: in its first phase, compiled with costs where costs are to be shown.
        decisions: of a run; None takes those that need no measurement. epochs: length of the run, where the spec does not say.
        ranks: show which of so many ranks of a chain trains each local module. Raises RunError where there are fewer modules.
    """
    if ranks:
        check_modules(plan, _training(plan), ranks)
    before = backbone_view(plan)
    phases = plan.phases(epochs or _epochs(plan, decisions or ()), decisions)
    found = []
    for number, phase in enumerate(phases):
        later = phase.plan
        if plan.report.before and later is not plan and (len(phases) <= COSTED + 1 or number == len(phases) - 1):
            later = plan.advance_to(later.decisions, verify="off", costs=True)
        label = "; ".join(_label(plan, d) for d in phase.decisions) or "start"
        runs = runs_of(later, _training(plan), ranks) if ranks else ()
        found.append(PhaseDiff(phase.start, label, align(before, plan_view(later, epoch=phase.start, runs=runs))))
    return tuple(found)


def _training(plan: Plan) -> TrainSpec:
    return plan.spec.train if plan.spec is not None else TrainSpec()


def _epochs(plan: Plan, decisions: Sequence[Decision]) -> int:
    """The run's length; where no spec says it, long enough for every trigger. Always long enough for the decisions."""
    length = plan.spec.train.epochs if plan.spec is not None else None
    if length is None:
        length = 1 + max((getattr(p.when, "until", None) or getattr(p.when, "epoch", None) or 0 for p in plan.passes), default=0)
    return max([length, *(int(d.epoch) + 1 for d in decisions)])


def _label(plan: Plan, decision: Decision) -> str:
    regions = decision.regions
    what = "all" if regions is None else ", ".join(regions[:3]) + (" …" if len(regions) > 3 else "")
    name = plan.passes[decision.index].name
    return f"{name} {what}" if decision.action == "apply" else f"{name} undone: {what}"
