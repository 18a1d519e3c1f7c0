"""graphopt: a compiler for training graphs.

plan = graphopt.compile(model, "spec.toml")      # or a list of passes, with input=(3, 224, 224)
train(plan.module)                               # any loop
backbone = plan.export()                         # the ordinary model, trained
"""

from graphopt.compiler import compile
from graphopt.errors import (
    BackboneError,
    GraphoptError,
    PassError,
    RunError,
    SelectError,
    SpecError,
    TraceError,
    VerifyError,
)
from graphopt.loading import load, save
from graphopt.regions import Region
from graphopt.rewriting import Decision, Effects, Match, Needs, Note, Pass, Plan, Report, Section
from graphopt.select import Filter, Selector, select
from graphopt.trace import Graph, trace

__all__ = [
    "BackboneError",
    "Decision",
    "Effects",
    "Filter",
    "Graph",
    "GraphoptError",
    "Match",
    "Needs",
    "Note",
    "Pass",
    "PassError",
    "Plan",
    "Region",
    "Report",
    "RunError",
    "Section",
    "SelectError",
    "Selector",
    "SpecError",
    "TraceError",
    "VerifyError",
    "compile",
    "load",
    "save",
    "select",
    "trace",
]
