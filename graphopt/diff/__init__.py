"""Graph diffs to look at: one data structure, and its renderings under `render`."""

from __future__ import annotations

from graphopt.compiler.plan import Plan
from graphopt.diff.join import Diff, Fold, join
from graphopt.diff.rows import Band, NodeRow, PassLine, Row, Side
from graphopt.diff.side import backbone_side, plan_side
from graphopt.diff.status import STATUSES

__all__ = ["STATUSES", "Band", "Diff", "Fold", "NodeRow", "PassLine", "Row", "Side", "backbone_side", "diff", "join", "plan_side"]


def diff(before: Plan, after: Plan | None = None) -> Diff:
    """What a plan does to its backbone; or, with two plans, how the second differs from the first.

    The plans may be of one backbone (two specs, two phases) or of two. Costs appear where the plans were compiled with costs.
    """
    if after is None:
        return join(backbone_side(before), plan_side(before))
    return join(plan_side(before), plan_side(after))
