"""The diff as a tree on the terminal, in colour and glyphs."""

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from graphopt.cost.figures import FIGURES, common_figures
from graphopt.diff.align import Diff, RowGroup, group_name
from graphopt.diff.model import STYLES, UNCHANGED, NodeRow, Row
from graphopt.diff.render.words import facts, glyphs, groups, passes_of, shape, status_words, title, total
from graphopt.units import show_change

_FIGURE = {f.name: f for f in FIGURES}
#: what the end of a line may say: the one that changes most, the first of equals
_AT_END = ("saved_activation_bytes", "trainable_parameters", "forward_flops")
_ASCII = str.maketrans({"→": "->", "×": "x", "╌": "-", "▤": "#", "…": "...", "−": "-", "≈": "~"})


def render(diff: Diff, *, unfold: bool = False, nodes: bool = False, unicode: bool = True) -> RenderableType:
    """A rich renderable; `unfold` gives every block a line, `nodes` shows the operations below each changed one."""
    return _Tree(diff, unfold, nodes, unicode).render()


class _Tree:
    def __init__(self, diff: Diff, unfold: bool, nodes: bool, unicode: bool) -> None:
        self.diff, self.unfold, self.nodes, self.unicode = diff, unfold, nodes, unicode
        self.shown_messages: set[str] = set()

    def render(self) -> RenderableType:
        diff = self.diff
        first = next((r.input_shape for r in diff.rows if r.input_shape), None)
        tree = Tree(self._text(f"input {shape(first)}".rstrip(), "dim"), guide_style="dim")
        for stage, members in groupby(groups(diff, unfold=self.unfold), key=lambda g: g.rows[0].stage):
            shown = list(members)
            branch = tree.add(Text(stage, style="bold")) if len(shown) > 1 and stage else tree
            for group in shown:
                self._add(branch, group)
        notes = (self._text(note, "yellow") for note in diff.notes)
        return Group(self._text(title(diff), "bold"), *notes, *self._table(), tree, self._legend())

    def _table(self) -> Iterator[Table]:
        figures = common_figures(self.diff.before.totals, self.diff.after.totals)
        if figures:
            table = Table(box=None, pad_edge=False, header_style="dim")
            table.add_column(f"a training step, batch {self.diff.after.batch}")
            for head in ("before", "after", ""):
                table.add_column(head, justify="right")
            for figure, before, after in figures:
                style = "green" if after < before else "yellow" if after > before else "dim"
                table.add_row(figure.title, figure.text(before), figure.text(after), Text(show_change(before, after), style=style))
            yield table

    def _add(self, branch: Tree, group: RowGroup) -> None:
        first = group.rows[0]
        if any(b == first.name for _, b in self.diff.after.gradient_stops):
            branch.add(self._text(f"╌╌ {self._stop_words(first)} ╌╌", "bold magenta"))
        line = branch.add(self._line(group))
        for message in first.messages:
            if message not in self.shown_messages:
                self.shown_messages.add(message)
                line.add(self._text(message, "dim italic"))
        if self.nodes and (first.status != UNCHANGED or self.unfold):
            for node in first.nodes:
                line.add(self._node(node))
        feature_input = self.diff.after.feature_input
        if feature_input in [r.name for r in group.rows]:
            sizes = shape(self.diff.after[feature_input].output_shape)
            branch.add(self._text(f"▤ features cached here: training starts at {sizes}", "bold red"))

    def _stop_words(self, row: Row) -> str:
        sources = {a for a, b in self.diff.after.gradient_stops if b == row.name}
        local = any(s.local and row.name in s.rows and not sources & set(s.rows) for s in self.diff.after.sections)
        return "no gradient passes: a local module begins" if local else "the backward pass stops here"

    def _line(self, group: RowGroup) -> Text:
        row = group.rows[0]
        style = STYLES[row.status].terminal
        line = self._text(f"{glyphs(row.statuses, unicode=self.unicode)} {group.name}", "dim" if row.plain else f"bold {style}")
        if row.kind:
            line.append(f"  {row.kind}", style="dim")
        if not row.plain:
            line.append(self._text(f"  {status_words(row)}", style))
            if words := facts(row):
                line.append(self._text(f" {words}"))
            if passes := passes_of(self.diff, row):
                line.append(f"  {passes}", style="dim")
        if row.former:
            line.append(self._text(f"  {group_name([r.former or r.name for r in group.rows])} in the first", "dim italic"))
        return line.append(self._text(_figure_words(group), "cyan"))

    def _node(self, node: NodeRow) -> Text:
        style = "dim" if node.statuses == (UNCHANGED,) else STYLES[node.statuses[0]].terminal
        line = Text(f"{glyphs(node.statuses, unicode=self.unicode)} {node.name}", style=style)
        line.append(self._text(f"  {node.what}  {shape(node.shape)}", "dim"))
        if node.changed_by is not None and node.statuses != (UNCHANGED,):
            line.append(f"  by {self.diff.after.passes[node.changed_by].name}", style="dim")
        return line

    def _legend(self) -> Text:
        line = Text()
        for status, count in self.diff.counts().items():
            line.append(f"{glyphs([status], unicode=self.unicode)} {status} {count}   ", style=STYLES[status].terminal)
        return line

    def _text(self, text: str, style: str = "") -> Text:
        return Text(text if self.unicode else text.translate(_ASCII), style=style)


def _figure_words(group: RowGroup) -> str:
    """The figure that changes most; of inserted rows, their parameters."""
    values = {name: (total(group.rows, name, "before"), total(group.rows, name, "after")) for name in _AT_END}
    changes = {name: (b, a) for name, (b, a) in values.items() if a is not None and b is not None and a != b}
    if changes:
        name = max(changes, key=lambda k: abs(changes[k][1] - changes[k][0]) / max(changes[k]))
        figure, (old, new) = _FIGURE[name], changes[name]
        return f"  {figure.short} {figure.text(old)} → {figure.text(new)} ({show_change(old, new)})"
    added = total(group.rows, "parameters", "after") if group.rows[0].attached_to else None
    return f"  {_FIGURE['parameters'].text(added)} parameters" if added else ""
