"""`graphopt export`: the ordinary model from a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.options import TrustOption, expanded
from graphopt.errors import RunError


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=expanded, help="A run's folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", parser=expanded, help="The safetensors file to write.")],
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
    options: dict[str, Any] = {"which": which, "weights": weights}
    written = export_run(run, out, **options, trust=trust)
    show(f"written: {written} ({show_size(written.stat().st_size)})")
    if is_plan_file(written):
        show("it holds the rewritten model and its spec: the backbone's architecture cannot express it. Load it with graphopt.load(file)")
