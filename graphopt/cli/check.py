"""`graphopt check`: the dry run."""

from __future__ import annotations

from typing import Any

import typer

from graphopt.cli.options import JsonOption, SetOption, SpecArgument, TrustOption, backbone_of, load_spec


def check(spec: SpecArgument, set_: SetOption = [], trust: TrustOption = False, as_json: JsonOption = False) -> None:  # noqa: B006
    """Say what each pass of SPEC would act on and what it would leave alone, with reasons. Changes nothing.

    Examples:

        graphopt check quickstart

        graphopt check spec.toml --json
    """
    from graphopt.backbone import build
    from graphopt.cli.screen import show_json
    from graphopt.rewriting import check as check_passes
    from graphopt.trace import trace

    loaded = load_spec(spec, set_, trust)
    with backbone_of(loaded):
        base = trace(build(loaded.backbone, trust=trust), loaded.backbone.input)
    places = [loaded.place_of(index) for index in range(len(loaded.passes))]
    found = check_passes(base, loaded.passes, (), places)
    rows = [_row(loaded, index, checkup) for index, checkup in enumerate(found)]
    if as_json:
        opaque = [{"path": path, "reason": reason} for path, reason in base.opaque]
        show_json({"name": loaded.name, "digest": loaded.digest, "passes": rows, "opaque": opaque})
        return
    _show(loaded, rows)


def _row(spec: Any, index: int, checkup: Any) -> dict[str, Any]:
    return {
        **checkup.value.table(),
        "line": spec.line_of(index),
        "regions": [region.name for region in checkup.match.regions],
        "notes": [{"level": note.level, "where": note.where, "why": note.why} for note in checkup.notes],
        "preserves": sorted(checkup.value.promises()),
    }


def _show(spec: Any, rows: list[dict[str, Any]]) -> None:
    from graphopt.cli.report import some
    from graphopt.cli.screen import show

    show(f"{spec.name or 'unnamed spec'}  ({spec.backbone.source}/{spec.backbone.name}, digest {spec.digest})")
    for number, row in enumerate(rows, start=1):
        at = f", line {row['line']}" if row["line"] else ""
        show(f"pass {number} {row['use']}{at}")
        show(f"  would act on: {some(row['regions']) or 'nothing'}")
        for note in row["notes"]:
            show(f"  {note['level']} {note['where']}: {note['why']}")
        if row["preserves"]:
            show(f"  preserves: {', '.join(row['preserves'])}")
    show("no conflicts" if rows else "no passes: the backbone trains as it is")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)
