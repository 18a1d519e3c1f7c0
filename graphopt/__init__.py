"""graphopt: a compiler for training graphs.

plan = graphopt.compile(model, "spec.toml")      # or a list of passes, with input=(3, 224, 224)
train(plan.module)                               # any loop
backbone = plan.export()                         # the ordinary model, trained

Names are imported when they are first used, so that `graphopt --help` starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.compiler.pass_base import ActiveMatch, Diagnostic, Effects, Match, Pass, RuntimeNeeds, Severity, Status
    from graphopt.compiler.plan import Plan
    from graphopt.compiler.report import Report
    from graphopt.compiler.triggers import Decision
    from graphopt.diff.align import Diff
    from graphopt.diff.notebook import picture
    from graphopt.driver import compile
    from graphopt.errors import BackboneError, GraphoptError, PassError, RunError, SelectError, SpecError, TraceError, VerifyError
    from graphopt.ir.editor import Editor
    from graphopt.ir.graph import Graph
    from graphopt.ir.regions import Region
    from graphopt.ir.section import Section
    from graphopt.ir.select import select
    from graphopt.ir.selector import Filter, Selector
    from graphopt.plan_file import save
    from graphopt.tracing import trace
    from graphopt.train.export import load
    from graphopt.train.loop import Phases

__all__ = ["ActiveMatch", "Decision", "Diagnostic", "Diff", "Editor", "Effects", "Filter", "Graph", "Match", "Pass", "Phases", "Plan"]
__all__ += ["Region", "Report", "RuntimeNeeds", "Section", "Selector", "Severity", "Status"]
__all__ += ["BackboneError", "GraphoptError", "PassError", "RunError", "SelectError", "SpecError", "TraceError", "VerifyError"]
__all__ += ["compile", "load", "picture", "save", "select", "trace"]

_MODULE_OF = {
    "Decision": "compiler.triggers",
    "Plan": "compiler.plan",
    "Report": "compiler.report",
    "Editor": "ir.editor",
    "Graph": "ir.graph",
    **{"Region": "ir.regions", "Section": "ir.section"} | dict.fromkeys(("Filter", "Selector"), "ir.selector"),
    "Diff": "diff.align",
    "picture": "diff.notebook",
    "compile": "driver",
    "select": "ir.select",
    "load": "train.export",
    "Phases": "train.loop",
    "save": "plan_file",
    "trace": "tracing",
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'compiler.pass_base')}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
