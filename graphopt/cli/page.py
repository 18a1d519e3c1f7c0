"""`graphopt report`: a run as one HTML page."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli.options import TrustOption, as_path, backbone_of, load_spec
from graphopt.errors import RunError


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder that `graphopt train` wrote.")],
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="The page; default: report.html in the folder.")] = None,
    costs: Annotated[bool, typer.Option("--costs/--no-costs", help="Forecast a training step of every phase, for the diff.")] = True,
    trust: TrustOption = False,
) -> None:
    """Write one HTML page about a run: curves, phases and decisions, memory and step time, and the diff.

    The page needs no network and nothing beside it. Examples:

        graphopt report runs/quickstart

        graphopt report runs/quickstart -o quickstart.html
    """
    import graphopt
    from graphopt.cli.screen import show
    from graphopt.diff.render.files import write
    from graphopt.diff.render.run import to_report
    from graphopt.diff.run import read_run
    from graphopt.driver import build_backbone as build

    folder = as_path(run)
    assert folder is not None
    found = read_run(folder)
    target = as_path(out) or folder / "report.html"
    if target.is_dir():
        raise RunError("is a folder", where=str(target), fix=f"Name a file in it: {target / 'report.html'}")
    spec = load_spec(run, [], trust)
    with backbone_of(spec):
        plan = graphopt.compile(build(spec.backbone, trust=trust), spec, verify="off", costs=costs)
    write(target, to_report(found, plan))
    show(f"written: {target}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)
