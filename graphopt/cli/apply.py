"""`graphopt apply`: rewrite, verify, and report what that costs and saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.options import (
    BatchOption,
    EpochOption,
    JsonOption,
    SetOption,
    SpecArgument,
    TrustOption,
    VerifyOption,
    checked_verify,
    expanded,
    load_spec,
    plan_at_epoch,
)

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan


def apply(
    spec: SpecArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", parser=expanded, help="Write spec, report, graph and diff there.")
    ] = None,
    epoch: EpochOption = None,
    batch: BatchOption = None,
    verify: VerifyOption = None,
    set_: SetOption = [],  # noqa: B006
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a backbone as SPEC says, verify every promise, and report what a training step costs before and after.

    Nothing trains. Examples:

        graphopt apply quickstart

        graphopt apply spec.toml -o plan --epoch 10

        graphopt apply spec.toml --json --set backbone.arguments.num_classes=100
    """
    from graphopt.cli.folder import check_folder, write_folder
    from graphopt.cli.report import show_report
    from graphopt.cli.screen import show, show_json
    from graphopt.ir.printing import graph_text
    from graphopt.spec import dumps

    if out is not None:
        check_folder(out)
    level = checked_verify(verify)
    loaded = load_spec(spec, set_, trust)
    plan = plan_at_epoch(loaded, epoch, trust=trust, verify=level or loaded.verify or "full", batch=batch)
    report = plan.report.to_dict()
    if out is not None:
        text = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
        files = {"spec.toml": dumps(loaded), "report.json": text, "graph.txt": graph_text(plan.graph)}
        write_folder(out, {**files, **_pictures(plan, all_phases=epoch is None)})
    if as_json:
        show_json(report)
        return
    show_report(plan)
    if out is not None:
        show(f"\nwritten: {out}/spec.toml, report.json, graph.txt, diff.html, diff.svg")


def _pictures(plan: Plan, *, all_phases: bool) -> dict[str, str]:
    """The diff as a page and as a picture: of all phases from this one on, or of this one alone."""
    from graphopt.diff import diff
    from graphopt.diff.phases import phase_diffs
    from graphopt.diff.render.page import to_html
    from graphopt.diff.render.svg import to_svg

    shown = phase_diffs(plan) if all_phases else diff(plan)
    return {"diff.html": to_html(shown), "diff.svg": to_svg(shown)}
