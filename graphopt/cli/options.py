"""Arguments and options that commands share, and the steps from them to a spec and a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.errors import BackboneError, RunError, TraceError


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


def load_spec(argument: str, overrides: list[str], trust: bool) -> Any:
    """The spec that an argument and its --set options mean."""
    from graphopt.spec import load

    return load(argument, trust=trust, overrides=overrides)


@contextmanager
def backbone_of(spec: Any) -> Iterator[None]:
    """Puts the place in the spec before what is said of its backbone."""
    try:
        yield
    except BackboneError as error:
        raise _placed(error, spec, "weights" if "weights" in error.what else "name") from error
    except TraceError as error:
        raise _placed(error, spec, "input") from error


def _placed(error: Any, spec: Any, field: str) -> Any:
    where = spec.where("backbone", field)
    return error.with_location(where) if where else error


def check_verify(verify: str | None, default: Any) -> Any:
    """The level of verification asked for, or `default`."""
    if verify is None:
        return default
    if verify not in ("full", "fast", "off"):
        raise RunError(f"expected full, fast or off, found {verify!r}", where="--verify")
    return verify


def build_plan(spec: Any, *, trust: bool, verify: Any, batch: int | None, epoch: int | None, costs: bool = True) -> Any:
    """The plan of a spec, in the phase that `epoch` trains in."""
    import torch

    import graphopt
    from graphopt.driver import build_backbone as build

    if epoch is not None and epoch >= spec.train.epochs:
        raise RunError(f"the run has epochs 0 to {spec.train.epochs - 1}, not {epoch}", where="--epoch")
    torch.manual_seed(spec.train.seed)
    with backbone_of(spec):
        module = build(spec.backbone, trust=trust)
        first = epoch is None
        plan = graphopt.compile(module, spec, batch=batch, verify=verify if first else "off", costs=costs and first)
    if epoch is None:
        return plan
    # A trigger that waits for measurements has not fired where nothing is measured; the others say all the spec knows.
    decisions: tuple[Any, ...] = ()
    for now in range(epoch + 1):
        due = plan.due(now, None, spec.train.epochs)
        if due:
            decisions = (*decisions, *due)
            plan = plan.advance_to(decisions, verify="off")
    return graphopt.compile(module, spec, batch=batch, verify=verify, costs=costs, decisions=decisions)


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


def as_path(text: str | None) -> Path | None:
    """A path option, with `~`."""
    return None if text is None else Path(text).expanduser()
