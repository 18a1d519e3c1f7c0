"""The diff as boxes and arrows, for the languages that lay them out themselves: Graphviz DOT, and Mermaid, which GitHub draws."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Literal, NamedTuple

from graphopt.compiler.pass_base import Status
from graphopt.diff.align import Diff, RowGroup
from graphopt.diff.model import REMOVED, STYLES
from graphopt.diff.render.words import facts, glyphs, groups, status_words, title

#: statuses whose boxes are dashed: what no longer takes part in training
DASHED = (Status.DROPPED, Status.BYPASSED, REMOVED)


class Arrow(NamedTuple):
    """From one box to another: activations, with or without gradients; what was there before, or is read aside; or weights."""

    source: str
    target: str
    kind: Literal["flow", "no gradient", "dashed", "weights"]


def _boxes(diff: Diff, unfold: bool) -> tuple[list[tuple[str, list[RowGroup]]], dict[str, str]]:
    """The stages with the groups of rows in them, and the identifier of each row's box."""
    shown = groups(diff, unfold=unfold)
    stages = [(stage, list(members)) for stage, members in groupby(shown, key=lambda g: g.rows[0].stage)]
    return stages, {row.name: f"n{number}" for number, group in enumerate(shown) for row in group.rows}


def _arrows(diff: Diff, key: Mapping[str, str]) -> Iterator[Arrow]:
    """Each once, those of activations first."""
    stops = set(diff.after.gradient_stops)
    attached = {(r.attached_to, r.name) for r in diff.rows}
    seen = set()
    for a, b, when in diff.edges:
        ends = key[a], key[b]
        if ends[0] != ends[1] and ends not in seen:
            seen.add(ends)
            yield Arrow(*ends, "no gradient" if (a, b) in stops else "dashed" if when == "before" or (a, b) in attached else "flow")
    for row in diff.rows:
        for source in row.sources:
            if source in key and key[source] != key[row.name]:
                yield Arrow(key[source], key[row.name], "weights")


def _label(group: RowGroup) -> list[str]:
    """The lines of a box below the group's name."""
    row = group.rows[0]
    status = "" if row.plain else f"{glyphs(row.statuses[:1])} {status_words(row)}"
    return [line for line in (row.kind, status, facts(row)) if line]


_DOT_ARROWS = {
    "flow": "",
    "no gradient": f' [label="no gradient", color="{STYLES[Status.ISOLATED].light}", arrowhead=tee]',
    "dashed": " [style=dashed]",
    "weights": f' [style=dotted, constraint=false, color="{STYLES[Status.SHARED].light}"]',
}


def to_dot(diff: Diff, *, unfold: bool = False) -> str:
    """One box per row or group, one cluster per stage; `dot -Tsvg` draws it."""
    stages, key = _boxes(diff, unfold)
    lines = [
        "digraph diff {",
        f"  label={quoted(title(diff))}; labelloc=t; rankdir=TB; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=11, penwidth=2];',
    ]
    for number, (stage, members) in enumerate(stages):
        lines.append(f'  subgraph cluster_{number} {{\n    label={quoted(stage)}; color="#c8ccd2"; style=rounded;')
        for group in members:
            row = group.rows[0]
            dash = ', style="rounded,filled,dashed"' if row.status in DASHED else ""
            text = quoted("\n".join([group.name, *_label(group)]))
            lines.append(f'    {key[row.name]} [label={text}, color="{STYLES[row.status].light}"{dash}];')
        lines.append("  }")
    lines += [f"  {a.source} -> {a.target}{_DOT_ARROWS[a.kind]};" for a in _arrows(diff, key)]
    return "\n".join([*lines, "}"]) + "\n"


def quoted(text: str) -> str:
    """A DOT string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


_SHAPES: dict[str, tuple[str, str]] = {Status.INSERTED: ("([", "])"), Status.DROPPED: ("[/", "/]"), Status.SHARED: ("[[", "]]")}
_MERMAID_ARROWS = {"flow": "-->", "no gradient": '-- "no gradient" -->', "dashed": "-.->", "weights": '-. "weights" .->'}


def to_mermaid(diff: Diff, *, unfold: bool = False) -> str:
    """One node per row or group, one subgraph per stage, status by colour and glyph."""
    stages, key = _boxes(diff, unfold)
    lines = ["flowchart TB", '  input(["input"])']
    for number, (stage, members) in enumerate(stages):
        boxes = [f"  {key[group.rows[0].name]}{_box(group)}" for group in members]
        lines += boxes if len(boxes) == 1 else [f'  subgraph s{number}["{escaped(stage)}"]', *(f"  {box}" for box in boxes), "  end"]
    if diff.rows:
        lines.append(f"  input --> {key[diff.rows[0].name]}")
    lines += [f"  {a.source} {_MERMAID_ARROWS[a.kind]} {a.target}" for a in _arrows(diff, key)]
    used = {group.rows[0].status for _, members in stages for group in members}
    for status, style in STYLES.items():
        if status in used:
            dash = ",stroke-dasharray:5 3" if status in DASHED else ""
            lines.append(f"  classDef {status} fill:#ffffff,color:#1b1f24,stroke:{style.light},stroke-width:2px{dash}")
    return "\n".join(lines) + "\n"


def _box(group: RowGroup) -> str:
    status = group.rows[0].status
    left, right = _SHAPES.get(status, ("[", "]"))
    text = "<br/>".join([f"<b>{escaped(group.name)}</b>", *map(escaped, _label(group))])
    return f'{left}"{text}"{right}:::{status}'


def escaped(text: str) -> str:
    """Text that Mermaid shows as it is: its own entity codes for what it or HTML would read."""
    signs = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\n": " "}
    return "".join(signs.get(c, c) for c in text)
