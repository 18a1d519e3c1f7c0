"""The diff as Graphviz DOT."""

from __future__ import annotations

from itertools import groupby

from graphopt.diff.join import Diff
from graphopt.diff.render.words import facts, folds, statuses, title
from graphopt.diff.status import look


def to_dot(diff: Diff, *, unfold: bool = False) -> str:
    """One box per row or fold, one cluster per stage; `dot -Tsvg` draws it."""
    shown = folds(diff, unfold=unfold)
    key = {row.name: f"n{number}" for number, fold in enumerate(shown) for row in fold.rows}
    lines = [
        "digraph diff {",
        f"  label={quoted(title(diff))}; labelloc=t; rankdir=TB; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=11, penwidth=2];',
    ]
    for number, (stage, group) in enumerate(groupby(shown, key=lambda f: f.rows[0].stage)):
        lines.append(f"  subgraph cluster_{number} {{")
        lines.append(f'    label={quoted(stage)}; color="#c8ccd2"; style=rounded;')
        for fold in group:
            row = fold.rows[0]
            words = "" if row.statuses == ("kept",) and not row.changed else f"{look(row.status).glyph} {statuses(row)}"
            label = "\n".join(p for p in (fold.name, row.kind, words, facts(row)) if p)
            dash = ', style="rounded,filled,dashed"' if row.status in ("dropped", "bypassed", "removed") else ""
            lines.append(f'    {key[row.name]} [label={quoted(label)}, color="{look(row.status).light}"{dash}];')
        lines.append("  }")
    stops, seen = set(diff.after.frontier), set()
    for a, b, kind in diff.edges:
        pair = (key[a], key[b])
        if pair[0] == pair[1] or pair in seen:
            continue
        seen.add(pair)
        options = []
        if (a, b) in stops:
            options += ['label="no gradient"', 'color="#a8467f"', "arrowhead=tee"]
        if kind == "before":
            options.append("style=dashed")
        said = f" [{', '.join(options)}]" if options else ""
        lines.append(f"  {pair[0]} -> {pair[1]}{said};")
    for row in diff.rows:
        for source in row.sources:
            if source in key and key[source] != key[row.name]:
                style = f'style=dotted, constraint=false, color="{look("shared").light}"'
                lines.append(f"  {key[source]} -> {key[row.name]} [{style}];")
    return "\n".join([*lines, "}"]) + "\n"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
