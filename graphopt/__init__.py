"""graphopt: a compiler for training graphs.

plan = graphopt.compile(model, "spec.toml")      # or a list of passes, with input=(3, 224, 224)
train(plan.module)                               # any loop
backbone = plan.export()                         # the ordinary model, trained
"""

from graphopt.compiler.pass_base import ActiveMatch, Diagnostic, Effects, Match, Pass, RuntimeNeeds, Severity, Status
from graphopt.compiler.plan import Plan
from graphopt.compiler.report import Report
from graphopt.compiler.triggers import Decision
from graphopt.driver import compile
from graphopt.errors import BackboneError, GraphoptError, PassError, RunError, SelectError, SpecError, TraceError, VerifyError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import Graph
from graphopt.ir.regions import Region
from graphopt.ir.section import Section
from graphopt.ir.select import Filter, Selector, select
from graphopt.loading import load
from graphopt.plan_file import save
from graphopt.trace import trace

__all__ = [
    "ActiveMatch",
    "BackboneError",
    "Decision",
    "Diagnostic",
    "Editor",
    "Effects",
    "Filter",
    "Graph",
    "GraphoptError",
    "Match",
    "Pass",
    "PassError",
    "Plan",
    "Region",
    "Report",
    "RunError",
    "RuntimeNeeds",
    "Section",
    "SelectError",
    "Selector",
    "Severity",
    "SpecError",
    "Status",
    "TraceError",
    "VerifyError",
    "compile",
    "load",
    "save",
    "select",
    "trace",
]
