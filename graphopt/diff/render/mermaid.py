"""The diff as a Mermaid flowchart: GitHub draws it in a pull request."""

from graphopt.compiler.pass_base import Status
from graphopt.diff.align import Diff, RowGroup
from graphopt.diff.render.flowchart import DASHED, Flowchart, label
from graphopt.diff.status import STYLES

_SHAPES: dict[str, tuple[str, str]] = {Status.INSERTED: ("([", "])"), Status.DROPPED: ("[/", "/]"), Status.SHARED: ("[[", "]]")}
_ARROWS = {"flow": "-->", "no gradient": '-- "no gradient" -->', "dashed": "-.->", "weights": '-. "weights" .->'}


def to_mermaid(diff: Diff, *, unfold: bool = False) -> str:
    """One node per row or group, one subgraph per stage, status by colour and glyph."""
    chart = Flowchart(diff, unfold=unfold)
    lines = ["flowchart TB", '  input(["input"])']
    for number, (stage, members) in enumerate(chart.stages):
        boxes = [f"  {chart.key[group.rows[0].name]}{_box(group)}" for group in members]
        lines += boxes if len(boxes) == 1 else [f'  subgraph s{number}["{escaped(stage)}"]', *(f"  {box}" for box in boxes), "  end"]
    if diff.rows:
        lines.append(f"  input --> {chart.key[diff.rows[0].name]}")
    lines += [f"  {a.source} {_ARROWS[a.kind]} {a.target}" for a in chart.arrows()]
    used = {group.rows[0].status for _, members in chart.stages for group in members}
    for status, style in STYLES.items():
        if status in used:
            dash = ",stroke-dasharray:5 3" if status in DASHED else ""
            lines.append(f"  classDef {status} fill:#ffffff,color:#1b1f24,stroke:{style.light},stroke-width:2px{dash}")
    return "\n".join(lines) + "\n"


def _box(group: RowGroup) -> str:
    status = group.rows[0].status
    left, right = _SHAPES.get(status, ("[", "]"))
    text = "<br/>".join([f"<b>{escaped(group.name)}</b>", *map(escaped, label(group))])
    return f'{left}"{text}"{right}:::{status}'


def escaped(text: str) -> str:
    """Text that Mermaid shows as it is: its own entity codes for what it or HTML would read."""
    signs = {"#": "#35;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\n": " "}
    return "".join(signs.get(c, c) for c in text)
