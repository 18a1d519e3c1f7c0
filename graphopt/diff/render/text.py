"""The diff as a tree on the terminal, in colour and glyphs."""

from __future__ import annotations

from io import StringIO
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from graphopt.diff.join import Diff, Fold
from graphopt.diff.render.words import amount, change, facts, folds, glyph, passes_of, shape, statuses, summary, title, total
from graphopt.diff.rows import NodeRow, Row
from graphopt.diff.status import look

#: what the end of a line may tell: the one that changes most, the first of equals
_AT_END = {"saved_activation_bytes": "saved", "trainable_parameters": "trainable", "forward_flops": "forward"}


def render(diff: Diff, *, unfold: bool = False, nodes: bool = False, unicode: bool = True) -> RenderableType:
    """A rich renderable.

    Args:
        unfold: a line for every block, equal neighbours too. nodes: the operations below each changed block.
        unicode: glyphs and lines outside ASCII.
    """
    parts: list[RenderableType] = [Text(_plain(title(diff), unicode), style="bold")]
    parts += [Text(_plain(note, unicode), style="yellow") for note in diff.notes]
    figures = summary(diff.before.totals, diff.after.totals)
    if figures:
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        table.add_column(f"a training step, batch {diff.after.batch}")
        for head in ("before", "after", ""):
            table.add_column(head, justify="right")
        for name, before, after, by in figures:
            table.add_row(name, before, after, Text(by, style="green" if by.startswith("-") else "yellow" if by != "=" else "dim"))
        parts.append(table)
    stops, tap = {b for _, b in diff.after.frontier}, diff.after.tap
    told: set[str] = set()
    tree = Tree(Text(f"input {shape(('N', *_input(diff)))}".rstrip() if unicode else "input", style="dim"), guide_style="dim")
    for stage, members in groupby(folds(diff, unfold=unfold), key=lambda f: f.rows[0].stage):
        group = list(members)
        branch = tree
        if len(group) > 1 and stage:
            branch = tree.add(Text(stage, style="bold"))
        for fold in group:
            first = fold.rows[0]
            if first.name in stops:
                branch.add(Text(_plain(f"╌╌ {_stop_words(diff, first)} ╌╌", unicode), style="bold magenta"))
            leaf = branch.add(_line(diff, fold, unicode))
            for reason in [r for r in first.reasons if r not in told]:
                told.add(reason)
                leaf.add(Text(_plain(reason, unicode), style="dim italic"))
            if nodes and (first.status != "kept" or unfold):
                for node in first.nodes:
                    leaf.add(_node(node, unicode))
            if tap in [r.name for r in fold.rows]:
                words = f"▤ features kept here: training starts at {shape(diff.after[tap].leaving)}"
                branch.add(Text(_plain(words, unicode), style="bold red"))
    parts.append(tree)
    parts.append(_legend(diff, unicode))
    return Group(*parts)


def to_text(diff: Diff, *, width: int = 120, unfold: bool = False, nodes: bool = False, colour: bool = False, unicode: bool = True) -> str:
    """The same as a string, e.g. for a file."""
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None, legacy_windows=False)
    console.print(render(diff, unfold=unfold, nodes=nodes, unicode=unicode))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _input(diff: Diff) -> tuple[str | int, ...]:
    first = next((r.entering for r in diff.rows if r.entering), None)
    return tuple(first[1:]) if first else ()


def _stop_words(diff: Diff, row: Row) -> str:
    sources = {a for a, b in diff.after.frontier if b == row.name}
    local = any(b.local and row.name in b.rows and not sources & set(b.rows) for b in diff.after.bands)
    return "gradients do not pass: a local module begins" if local else "the backward stops here"


def _line(diff: Diff, fold: Fold, unicode: bool) -> Text:
    row = fold.rows[0]
    style = look(row.status).terminal
    dim = row.statuses == ("kept",) and not row.changed
    line = Text()
    line.append(_plain(f"{glyph(row, unicode=unicode)} {fold.name}", unicode), style="dim" if dim else f"bold {style}")
    if row.kind:
        line.append(f"  {row.kind}", style="dim")
    if not dim:
        line.append(_plain(f"  {statuses(row)}", unicode), style=style)
        if said := facts(row):
            line.append(_plain(f" {said}", unicode))
        if by := passes_of(row, diff.after.passes):
            line.append(f"  {by}", style="dim")
    figures = {key: (total(fold.rows, key, "before"), total(fold.rows, key, "after")) for key in _AT_END}
    changed = {k: abs(b - a) / max(a, b) for k, (b, a) in figures.items() if a is not None and b is not None and a != b}
    if changed:
        key = max(changed, key=lambda k: changed[k])
        old, new = (value or 0 for value in figures[key])
        line.append(_plain(f"  {_AT_END[key]} {amount(key, old)} → {amount(key, new)} ({change(old, new)})", unicode), style="cyan")
    elif row.beside and (added := total(fold.rows, "parameters", "after")):
        line.append(f"  {amount('parameters', added)} parameters", style="cyan")
    return line


def _node(node: NodeRow, unicode: bool) -> Text:
    line = Text()
    signs = "".join(look(s).glyph if unicode else look(s).ascii for s in node.statuses)
    dim = node.statuses == ("kept",)
    line.append(f"{signs} {node.name}", style="dim" if dim else look(node.statuses[0]).terminal)
    line.append(_plain(f"  {node.what}  {shape(node.shape)}", unicode), style="dim")
    if node.by:
        line.append(f"  by {node.by}", style="dim")
    return line


def _legend(diff: Diff, unicode: bool) -> Text:
    line = Text()
    for status, count in diff.counts().items():
        sign = look(status).glyph if unicode else look(status).ascii
        line.append(f"{sign} {status} {count}   ", style=look(status).terminal)
    return line


_ASCII = str.maketrans({"→": "->", "×": "x", "╌": "-", "▤": "#", "…": "...", "−": "-", "≈": "~"})  # type: ignore[arg-type]


def _plain(text: str, unicode: bool) -> str:
    return text if unicode else text.translate(_ASCII)
