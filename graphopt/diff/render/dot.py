"""The diff as Graphviz DOT."""

from graphopt.compiler.pass_base import Status
from graphopt.diff.align import Diff
from graphopt.diff.render.flowchart import DASHED, Flowchart, label
from graphopt.diff.render.words import title
from graphopt.diff.status import STYLES

_ARROWS = {
    "flow": "",
    "no gradient": f' [label="no gradient", color="{STYLES[Status.ISOLATED].light}", arrowhead=tee]',
    "dashed": " [style=dashed]",
    "weights": f' [style=dotted, constraint=false, color="{STYLES[Status.SHARED].light}"]',
}


def to_dot(diff: Diff, *, unfold: bool = False) -> str:
    """One box per row or group, one cluster per stage; `dot -Tsvg` draws it."""
    chart = Flowchart(diff, unfold=unfold)
    lines = [
        "digraph diff {",
        f"  label={quoted(title(diff))}; labelloc=t; rankdir=TB; fontname=Helvetica;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, fontsize=11, penwidth=2];',
    ]
    for number, (stage, members) in enumerate(chart.stages):
        lines.append(f'  subgraph cluster_{number} {{\n    label={quoted(stage)}; color="#c8ccd2"; style=rounded;')
        for group in members:
            row = group.rows[0]
            dash = ', style="rounded,filled,dashed"' if row.status in DASHED else ""
            text = quoted("\n".join([group.name, *label(group)]))
            lines.append(f'    {chart.key[row.name]} [label={text}, color="{STYLES[row.status].light}"{dash}];')
        lines.append("  }")
    lines += [f"  {a.source} -> {a.target}{_ARROWS[a.kind]};" for a in chart.arrows()]
    return "\n".join([*lines, "}"]) + "\n"


def quoted(text: str) -> str:
    """A DOT string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
