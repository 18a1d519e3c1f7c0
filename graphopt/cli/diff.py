"""`graphopt diff`: the backbone beside what a spec makes of it."""

from __future__ import annotations

from typing import Any

import typer

from graphopt.cli.options import EpochOption, JsonOption, SetOption, SpecArgument, TrustOption, build_plan, load_spec


def diff(
    spec: SpecArgument,
    epoch: EpochOption = None,
    set_: SetOption = [],  # noqa: B006
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show, block by block, what SPEC changes in its backbone; equal neighbours fold into one line.

    Example:

        graphopt diff quickstart --epoch 5
    """
    from graphopt.cli.screen import grid, show, show_json

    loaded = load_spec(spec, set_, trust)
    plan = build_plan(loaded, trust=trust, verify="off", batch=None, epoch=epoch, costs=False)
    rows = _rows(plan)
    if as_json:
        show_json({"name": loaded.name, "digest": plan.digest, "rows": rows})
        return
    table = grid("", "path", "kind", "what changes")
    for glyph, names, kind, changes in _folded(rows):
        table.add_row(glyph, names, kind, changes, style="" if changes else "dim")
    show(table)


def _rows(plan: Any) -> list[dict[str, Any]]:
    """One row per block and per top-level part beside the blocks, with the passes that touched it."""
    from graphopt.cli.inspect import tree

    touched: list[tuple[str, set[Any]]] = []
    for number, item in enumerate(plan.report.passes, start=1):
        if item.active:
            nodes = {node for name in item.regions for node in _nodes(plan.base, name)}
            touched.append((f"{item.value.use} (pass {number})", nodes))
    rows = []
    for region, _, block in tree(plan.base):
        own = set(region.nodes)
        if not block and any(other is not region and set(other.nodes) < own for other, _, _ in tree(plan.base)):
            continue  # a container: its parts have rows of their own
        changes = [f"{name}{'' if own <= nodes else ', in part'}" for name, nodes in touched if own & nodes]
        rows.append({"name": region.name, "kind": region.kind, "changes": changes})
    return rows


def _nodes(base: Any, name: str) -> tuple[Any, ...]:
    known = {block.name: block for block in base.blocks()}
    if name in known:
        return tuple(known[name].nodes)
    return tuple(base.region(name).nodes) if name in base.paths() else ()


def _folded(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    out: list[tuple[str, str, str, str, int]] = []
    for row in rows:
        changes = "; ".join(row["changes"])
        glyph = "~" if changes else "="
        if out and out[-1][0] == glyph and out[-1][2] == row["kind"] and out[-1][3] == changes:
            first = out[-1][1].split(" .. ")[0]
            out[-1] = (glyph, f"{first} .. {row['name']}", row["kind"], changes, out[-1][4] + 1)
        else:
            out.append((glyph, row["name"], row["kind"], changes, 1))
    return [(glyph, f"{names} x{count}" if count > 1 else names, kind, changes) for glyph, names, kind, changes, count in out]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("diff")(diff)
