"""What a plan does to its backbone, block by block: one data structure, and its renderings under `render`."""

from graphopt.diff.align import Diff, RowGroup, align
from graphopt.diff.model import STYLES, ModelView, NodeRow, PassInfo, Row, SectionBox
from graphopt.diff.view import backbone_view, plan_view

__all__ = ["STYLES", "Diff", "ModelView", "NodeRow", "PassInfo", "Row", "RowGroup", "SectionBox", "align", "backbone_view", "plan_view"]
