"""`load`: a model from a plan file or from the folder of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.errors import RunError
from graphopt.plan_file import read_plan_file, rebuilt
from graphopt.train.checkpoint import check_digest
from graphopt.train.export import load_run
from graphopt.train.phase import load_strictly


def load(path: str | os.PathLike[str], *, trust: bool = False, plan: Plan | None = None) -> nn.Module:
    """The model in a file that `save` or `graphopt export` wrote, or in a run's folder; in eval mode.

    Args:
        trust: let its spec run Python code that it names.
        plan: for a file or run of a plan compiled by hand, that plan (in any phase).

    Raises:
        RunError: nothing there, not such a file, or a plan compiled by hand without `plan`.
    """
    return load_plan(path, trust=trust, plan=plan).module.eval()


def load_plan(path: str | os.PathLike[str], *, trust: bool = False, plan: Plan | None = None) -> Plan:
    """The same as a plan: `.module` trains on, `.advance_to(...)` goes on to other phases. Raises as `load` does."""
    source = Path(path)
    if source.is_dir() or source.suffix == ".pt":
        return load_run(source, plan=plan, trust=trust)
    about, state = read_plan_file(source)
    decisions = [Decision(**{**d, "regions": d["regions"] and tuple(d["regions"])}) for d in json.loads(about["decisions"])]
    if plan is not None:
        check_digest(about["digest"], plan.digest, str(source))
        plan = plan.advance_to(decisions, verify="off")
    elif not about["spec"]:
        raise RunError("it is of a plan compiled by hand", where=str(source), fix="Give that plan: graphopt.load(path, plan=plan)")
    else:
        plan = rebuilt(about["spec"], decisions, trust)
    load_strictly(plan.module, state)
    return plan
