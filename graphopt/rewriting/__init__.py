"""Passes, triggers, the pipeline, and the one seam between passes."""

from graphopt.rewriting.passes import Effects, FeatureCut, Mark, Match, Needs, Note, Pass
from graphopt.rewriting.pipeline import Checkup, check
from graphopt.rewriting.plan import Plan
from graphopt.rewriting.report import PassReport, Report
from graphopt.rewriting.sections import Body, NoGrad, Section, emit
from graphopt.rewriting.triggers import Decision

__all__ = [
    "Body",
    "Checkup",
    "Decision",
    "Effects",
    "FeatureCut",
    "Mark",
    "Match",
    "Needs",
    "NoGrad",
    "Note",
    "Pass",
    "PassReport",
    "Plan",
    "Report",
    "Section",
    "check",
    "emit",
]
