"""The diff as a Mermaid flowchart: GitHub draws it in a pull request."""

from __future__ import annotations

from itertools import groupby

from graphopt.diff.join import Diff, Fold
from graphopt.diff.render.words import facts, folds, statuses
from graphopt.diff.status import STATUSES, look

_SHAPES = {"inserted": ("([", "])"), "dropped": ("[/", "/]"), "shared": ("[[", "]]")}


def to_mermaid(diff: Diff, *, unfold: bool = False) -> str:
    """One node per row or fold, one subgraph per stage, status by colour and glyph."""
    shown = folds(diff, unfold=unfold)
    key = {row.name: f"n{number}" for number, fold in enumerate(shown) for row in fold.rows}
    lines = ["flowchart TB", '  input(["input"])']
    for number, (stage, group) in enumerate(groupby(shown, key=lambda f: f.rows[0].stage)):
        members = list(group)
        indent = "  "
        if len(members) > 1:
            lines.append(f'  subgraph s{number}["{escaped(stage)}"]')
            indent = "    "
        for fold in members:
            row = fold.rows[0]
            left, right = _SHAPES.get(row.status, ("[", "]"))
            lines.append(f'{indent}{key[row.name]}{left}"{_label(fold)}"{right}:::{row.status}')
        if len(members) > 1:
            lines.append("  end")
    if shown:
        lines.append(f"  input --> {key[shown[0].rows[0].name]}")
    stops = set(diff.after.frontier)
    beside = {r.name: r.beside for r in diff.rows if r.beside}
    seen = set()
    for a, b, kind in diff.edges:
        pair = (key[a], key[b])
        if pair[0] == pair[1] or pair in seen:
            continue
        seen.add(pair)
        if (a, b) in stops:
            arrow = '-- "no gradient" -->'
        elif kind == "before" or beside.get(b) == a:
            arrow = "-.->"
        else:
            arrow = "-->"
        lines.append(f"  {pair[0]} {arrow} {pair[1]}")
    for row in diff.rows:
        for source in row.sources:
            if source in key and key[source] != key[row.name]:
                lines.append(f'  {key[source]} -. "weights" .-> {key[row.name]}')
    used = {f.rows[0].status for f in shown}
    for status in [s for s in STATUSES if s in used]:
        dash = ",stroke-dasharray:5 3" if status in ("dropped", "bypassed", "removed") else ""
        lines.append(f"  classDef {status} fill:#ffffff,color:#1b1f24,stroke:{look(status).light},stroke-width:2px{dash}")
    return "\n".join(lines) + "\n"


def _label(fold: Fold) -> str:
    row = fold.rows[0]
    parts = [f"<b>{escaped(fold.name)}</b>", escaped(row.kind)]
    if row.statuses != ("kept",) or row.changed:
        parts.append(escaped(f"{look(row.status).glyph} {statuses(row)}"))
    if said := facts(row):
        parts.append(escaped(said))
    return "<br/>".join(p for p in parts if p)


def escaped(text: str) -> str:
    """Text that Mermaid shows as it is: its own entity codes for what it or HTML would read."""
    signs = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;"}
    return "".join(signs.get(c, c) for c in text).replace("\n", " ")
