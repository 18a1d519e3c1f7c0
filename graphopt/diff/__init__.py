"""What a plan does to its backbone, block by block: one data structure, and its renderings under `render`."""

from graphopt.compiler.plan import Plan
from graphopt.diff.align import Diff, RowGroup, align
from graphopt.diff.model import STYLES, ModelView, NodeRow, PassInfo, Row, SectionBox
from graphopt.diff.view import backbone_view, plan_view

__all__ = [
    "STYLES", "Diff", "ModelView", "NodeRow", "PassInfo", "Row", "RowGroup", "SectionBox", "align", "backbone_view", "diff", "plan_view"
]  # fmt: skip


def diff(before: Plan, after: Plan | None = None) -> Diff:
    """What a plan does to its backbone; or, with two plans, how the second differs from the first.

    The plans may be of one backbone (two specs, two phases) or of two. Costs appear where the plans were compiled with costs.
    """
    if after is None:
        return align(backbone_view(before), plan_view(before))
    return align(plan_view(before), plan_view(after))
