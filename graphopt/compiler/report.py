"""The report of a compilation: its figures, whole and per pass."""

import html
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from graphopt.compiler.pass_base import Diagnostic, PassInstance
from graphopt.compiler.verify import Checked
from graphopt.cost import Advice, Cost, advise, where_memory_is
from graphopt.cost.figures import common_figures
from graphopt.errors import listed, printable
from graphopt.ir.graph import Opaque
from graphopt.units import show_change


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        active: whether its trigger has fired. regions: names of the regions it changed. verified: the properties that were checked.
        before, after: costs of one training step around this pass; None if costs were not asked for. figures: of the pass's own.
    """

    instance: PassInstance
    active: bool
    regions: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    verified: tuple[Checked, ...] = ()
    before: Cost | None = None
    after: Cost | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Warnings about wasted memory or compute, from the costs around this pass; none without costs."""
        return advise(self.before, self.after) if self.before is not None and self.after is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **self.instance.value.table(),
            "active": self.active,
            "regions": list(self.regions),
            "diagnostics": [{"severity": str(d.severity), "location": d.location, "message": d.message} for d in self.diagnostics],
            "verified": [asdict(c) for c in self.verified],
            **_costs(self.before, self.after, self.advice),
            "line": self.instance.line,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Report:
    """A compiled plan in figures: the backbone before, the plan after, and each pass between.

    Attributes:
        batch: samples in the training step that the costs are of.
        opaque: modules that were not traced into, as (path, reason). unused: parameters that the backbone's step gives no gradient.
        no_costs: why there are none, although they were asked for.
    """

    name: str
    digest: str
    batch: int
    before: Cost | None
    after: Cost | None
    passes: tuple[PassReport, ...]
    opaque: tuple[Opaque, ...] = ()
    unused: tuple[str, ...] = ()
    no_costs: str | None = None

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Which part holds most of the compiled step's memory; none without costs."""
        return where_memory_is(self.after) if self.after is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "digest": self.digest,
            "batch": self.batch,
            **_costs(self.before, self.after, self.advice),
            "passes": [p.to_dict() for p in self.passes],
            "opaque": [o._asdict() for o in self.opaque],
            "unused_parameters": list(self.unused),
            "no_costs": self.no_costs,
        }

    def tables(self) -> "tuple[Table, ...]":
        """The report as tables of text: the figures of a training step before and after (none without costs), and the passes."""
        found = []
        if self.before is not None and self.after is not None:
            figures = common_figures(self.before.to_dict(), self.after.to_dict())
            rows = tuple((f.title, f.text(old), f.text(new), show_change(old, new)) for f, old, new in figures)
            found.append(Table((f"a training step, batch {self.batch}", "before", "after", "change"), rows, "right"))
        if self.passes:
            head = ("pass", "regions", "verified", "messages")
            found.append(Table(head, tuple(_pass_row(number, item) for number, item in enumerate(self.passes, start=1))))
        return tuple(found)

    def __str__(self) -> str:
        return self._repr_markdown_()

    def _repr_markdown_(self) -> str:
        """The tables in Markdown: what `print` and viewers without HTML show."""
        lines = [f"**{_markdown(self._heading())}**"]
        for table in self.tables():
            lines += [
                "",
                _markdown_row(table.head),
                _markdown_row((":---", *("---:" if table.align == "right" else ":---",) * (len(table.head) - 1))),
            ]
            lines += [_markdown_row(map(_markdown, row)) for row in table.rows]
        return "\n".join([*lines, *(f"\n{_markdown(note)}" for note in self._notes())]) + "\n"

    def _repr_html_(self) -> str:
        """The tables in HTML: what a notebook shows."""
        parts = [f"<p><b>{_html(self._heading())}</b></p>"]
        for table in self.tables():
            body = "".join(_html_row("td", row, table.align) for row in table.rows)
            parts.append(f"<table><thead>{_html_row('th', table.head, table.align)}</thead><tbody>{body}</tbody></table>")
        return "".join([*parts, *(f"<p>{_html(note)}</p>" for note in self._notes())])

    def _heading(self) -> str:
        return f"{self.name or 'unnamed spec'} (digest {self.digest})"

    def _notes(self) -> list[str]:
        """What the tables do not say."""
        notes = [f"worth knowing: {advice}" for advice in self.advice]
        notes += [f"no costs: {self.no_costs}"] if self.no_costs else []
        notes += [f"not traced into: {path} ({reason})" for path, reason in self.opaque]
        return [*notes, *([f"no gradient reaches {listed(self.unused)}"] if self.unused else [])]


class Table(NamedTuple):
    """A table of text: the titles of its columns, its rows, and to which side all columns but the first are set."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str = "left"


def _pass_row(number: int, item: PassReport) -> tuple[str, ...]:
    line = f", line {item.instance.line}" if item.instance.line else ""
    name = f"{number} {item.instance.value.name}{line}{'' if item.active else ' (not in this phase)'}"
    verified = (f"{c.property} ({'equal' if c.difference == 0 else f'within {c.difference:.1e}'})" for c in item.verified)
    messages = [*(f"{d.severity} {d.location}: {d.message}" for d in item.diagnostics), *map(str, item.advice)]
    return name, listed(item.regions), ", ".join(verified), "; ".join(messages)


def _markdown(text: str) -> str:
    """A text that Markdown shows as it is, in a table too."""
    plain = printable(text).replace("\n", " ")
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in plain)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html(text: str) -> str:
    return html.escape(printable(text))


def _html_row(kind: str, cells: Iterable[str], align: str) -> str:
    sides = ("left" if number == 0 else align for number in itertools.count())
    texts = (f"<{kind} style='text-align:{side}'>{_html(cell)}</{kind}>" for cell, side in zip(cells, sides, strict=False))
    return f"<tr>{''.join(texts)}</tr>"


def _costs(before: Cost | None, after: Cost | None, advice: tuple[Advice, ...]) -> dict[str, Any]:
    figures = {"before": before and before.to_dict(), "after": after and after.to_dict()}
    return {**figures, "advice": [asdict(a) for a in advice]}
