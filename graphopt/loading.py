"""`load`: a model from a plan file or from the folder of a run."""

import os
from pathlib import Path

from torch import nn

from graphopt.compiler.plan import Plan
from graphopt.plan_file import read_plan_file
from graphopt.train.export import load_run


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
    """The same as a plan: `.module` can be trained, `.advance_to(...)` gives other phases. Raises as `load` does."""
    source = Path(path)
    if source.is_dir() or source.suffix == ".pt":
        return load_run(source, plan=plan, trust=trust)
    return read_plan_file(source, plan=plan, trust=trust)
