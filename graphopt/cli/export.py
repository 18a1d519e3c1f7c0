"""`graphopt export`: the ordinary model out of a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graphopt.cli.options import TrustOption, as_path
from graphopt.errors import RunError


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The safetensors file to write.")],
    which: Annotated[str, typer.Option("--which", help="best or last checkpoint.")] = "best",
    weights: Annotated[str, typer.Option("--weights", help="auto, model or ema (the averaged weights).")] = "auto",
    trust: TrustOption = False,
) -> None:
    """Write a run's weights under the backbone's own keys; they load strictly into the untouched backbone.

    Example:

        graphopt export runs/quickstart -o model.safetensors
    """
    from graphopt.cli.screen import show
    from graphopt.plan_file import is_plan_file
    from graphopt.train.export import export_run
    from graphopt.units import show_size

    for option, value, known in (("--which", which, ("best", "last")), ("--weights", weights, ("auto", "model", "ema"))):
        if value not in known:
            raise RunError(f"expected {' or '.join(known)}, found {value!r}", where=option)
    path: Any = as_path(out)
    checked: Any = (which, weights)
    written = export_run(as_path(run), path, which=checked[0], weights=checked[1], trust=trust)  # type: ignore[arg-type]
    show(f"written: {written} ({show_size(written.stat().st_size)})")
    if is_plan_file(written):
        show("it holds the rewritten model with its spec: the backbone's architecture cannot express it. graphopt.load(file) gives it back")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)
