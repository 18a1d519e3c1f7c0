"""A plan's phases as frames of one film: what the spec alone foresees, or what a run really decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.diff.join import Diff, join
from graphopt.diff.rows import Side
from graphopt.diff.side import backbone_side, plan_side

#: with more phases than this, costs are worked out for the first and the last only (a step is forecast for each)
COSTED = 12


@dataclass(frozen=True)
class Frame:
    """One phase: the epoch it starts at, what was decided then, and the diff of the backbone and that phase."""

    epoch: int
    label: str
    diff: Diff


def foreseen(plan: Plan, epochs: int | None = None) -> tuple[Decision, ...]:
    """The decisions that the spec alone implies; triggers that wait for measurements have none."""
    total = epochs if epochs is not None else getattr(getattr(plan.spec, "train", None), "epochs", None)
    if total is None:
        total = 1 + max((getattr(p.when, "until", None) or getattr(p.when, "epoch", 0) or 0 for p in plan.passes), default=0)
    waiting = [not p.when.foreseeable for p in plan.passes]
    decided: tuple[Decision, ...] = plan.decisions
    now = plan
    for epoch in range(total):
        due = tuple(d for d in now.due(epoch, None, total) if not waiting[d.index])
        if due:
            decided = (*decided, *due)
            now = now.advance_to(decided, verify="off")
    return decided


def film(plan: Plan, decisions: Sequence[Decision] | None = None, *, epochs: int | None = None, costs: bool = True) -> tuple[Frame, ...]:
    """One frame per phase, the first at epoch 0; a plan whose passes all act from the start has one.

    Args:
        plan: in its first phase, compiled with costs where costs are to be shown.
        decisions: of a run; None takes what the spec foresees.
        epochs: length of the run, where the spec does not say.
    """
    ordered = sorted(foreseen(plan, epochs) if decisions is None else decisions, key=lambda d: d.epoch)
    before = backbone_side(plan)
    frames = [Frame(0, "start", join(before, plan_side(plan, epoch=0)))]
    moments = [(epoch, tuple(group)) for epoch, group in groupby(ordered, key=lambda d: d.epoch)]
    done: tuple[Decision, ...] = ()
    for number, (epoch, due) in enumerate(moments):
        done = (*done, *due)
        costed = costs and plan.report.before is not None and (len(moments) <= COSTED or number == len(moments) - 1)
        later = plan.advance_to(done, verify="off", costs=costed)
        side = plan_side(later, plan.name or None, epoch)
        frame = Frame(epoch, "; ".join(_words(plan, due)), join(before, side))
        if epoch == 0:
            frames = [frame]
        else:
            frames.append(frame)
    return tuple(frames)


def _words(plan: Plan, due: Sequence[Decision]) -> Iterator[str]:
    for decision in due:
        use = plan.passes[decision.index].name
        what = "all" if decision.regions is None else ", ".join(decision.regions[:3]) + (" …" if len(decision.regions) > 3 else "")
        yield f"{use} {what}" if decision.action == "apply" else f"{use} undone: {what}"


def side_at(plan: Plan, epoch: int | None, *, epochs: int | None = None) -> Side:
    """The side of the phase that `epoch` trains in; None is the first."""
    if epoch is None:
        return plan_side(plan)
    done = tuple(d for d in foreseen(plan, epochs) if d.epoch <= epoch)
    later = plan.advance_to(done, verify="off", costs=plan.report.before is not None) if done else plan
    return plan_side(later, f"{plan.name}, epoch {epoch}" if plan.name else f"epoch {epoch}", epoch)
