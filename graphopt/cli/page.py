"""`graphopt report`: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import TrustOption, check_target, expanded, load_spec, seeded_plan


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=expanded, help="The folder that `graphopt train` wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", parser=expanded, help="The page; default: report.html in the folder.")
    ] = None,
    costs: Annotated[bool, typer.Option("--costs/--no-costs", help="Forecast a training step of every phase, for the diff.")] = True,
    trust: TrustOption = False,
) -> None:
    """Write one HTML page about a run: curves, phases and decisions, memory and step time, and the diff.

    The page needs no network and no other files. Examples:

        graphopt report runs/quickstart

        graphopt report runs/quickstart -o quickstart.html
    """
    from graphopt.cli.screen import show
    from graphopt.diff.render.files import write
    from graphopt.diff.render.run import to_report
    from graphopt.diff.run import read_run

    found = read_run(run)
    target = out or run / "report.html"
    check_target(target, "report.html")
    plan = seeded_plan(load_spec(str(run), [], trust), trust=trust, verify="off", costs=costs)
    write(target, to_report(found, plan))
    show(f"written: {target}")
