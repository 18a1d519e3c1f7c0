"""Arguments and options that commands share, and the way from them to a spec and a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from graphopt.errors import RunError

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan
    from graphopt.spec import Spec
    from graphopt.spec.model import Verify


def expanded(text: str) -> Path:
    """A path on the command line, with `~` expanded."""
    return Path(text).expanduser()


def _names(incomplete: str) -> list[str]:
    from graphopt.spec import installed

    return [name for name in installed() if name.startswith(incomplete)]


SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A TOML file, or an installed spec's name.", autocompletion=_names)]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the spec: train.epochs=1, pass.0.when.epoch=3.")
]
TrustOption = Annotated[bool, typer.Option("--trust", help="Run the Python code that the spec names.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
VerifyOption = Annotated[str | None, typer.Option("--verify", help="full, fast or off; default: the spec's.")]
BatchOption = Annotated[int | None, typer.Option("--batch", min=1, help="Samples per step that costs are given for; default: the spec's.")]
EpochOption = Annotated[
    int | None, typer.Option("--epoch", min=0, help="Show the phase that this epoch (from 0) trains in; default: the first.")
]


def load_spec(argument: str, overrides: list[str], trust: bool) -> Spec:
    """The spec that an argument names, with its --set options applied."""
    from graphopt.spec import load

    return load(argument, trust=trust, overrides=overrides)


def checked_verify(verify: str | None) -> Verify | None:
    """The value of --verify, if it is one."""
    from graphopt.spec.model import Verify

    if verify is not None and verify not in get_args(Verify):
        raise RunError(f"expected full, fast or off, found {verify!r}", where="--verify")
    return cast("Verify | None", verify)


def seeded_plan(spec: Spec, *, trust: bool, verify: Verify, batch: int | None = None, costs: bool = True) -> Plan:
    """The plan of a spec in its first phase, with the initial weights of a run."""
    import torch

    import graphopt

    torch.manual_seed(spec.train.seed)
    return graphopt.compile(None, spec, batch=batch, verify=verify, costs=costs, trust=trust)


def plan_at_epoch(spec: Spec, epoch: int | None, *, trust: bool, verify: Verify, batch: int | None) -> Plan:
    """The plan of a spec in the phase that `epoch` trains in; None: in its first phase.

    Nothing is measured, so triggers that wait for measurements do not fire.
    """
    if epoch is None:
        return seeded_plan(spec, trust=trust, verify=verify, batch=batch)
    if epoch >= spec.train.epochs:
        raise RunError(f"the run has epochs 0 to {spec.train.epochs - 1}, not {epoch}", where="--epoch")
    plan = seeded_plan(spec, trust=trust, verify="off", batch=batch, costs=False)
    for now in range(epoch + 1):
        due = plan.due(now, None, spec.train.epochs)
        if due:
            plan = plan.advance_to((*plan.decisions, *due), verify="off")
    return plan.advance_to(plan.decisions, verify=verify, costs=True)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`"3,224,224"` as (3, 224, 224)."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise RunError(f"expected one sample's shape such as 3,224,224, found {text!r}", where="--input")
    return shape


def check_target(path: Path, name: str) -> None:
    """Before any work: a file can be written at `path`.

    Args:
        name: a file name to suggest where `path` is a folder.
    """
    if path.is_dir():
        raise RunError("is a folder", where=str(path), fix=f"Name a file in it: {path / name}")
    if not path.parent.is_dir():
        raise RunError("its folder does not exist", where=str(path), fix="Make the folder first")
