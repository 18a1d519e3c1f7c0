"""Phrases that all renderings share."""

from collections.abc import Iterable, Sequence
from typing import Literal

from graphopt.diff.align import Diff, RowGroup
from graphopt.diff.model import STYLES, UNCHANGED, Row, Shape


def total(rows: Sequence[Row], figure: str, when: Literal["before", "after"]) -> int | None:
    """A figure summed over rows; None where no row has it."""
    values = [f[figure] for r in rows if (f := getattr(r, when)) is not None and figure in f]
    return sum(values) if values else None


def status_words(row: Row) -> str:
    """`frozen + isolated`, or, where the two views differ, `shared → frozen`."""
    now = " + ".join(row.statuses)
    return now if row.was in ((UNCHANGED,), (), row.statuses) else f"{' + '.join(row.was)} → {now}"


def facts(row: Row) -> str:
    """Sources and details in one phrase: `from layer1.0, layer1.2 (a 0.5, b 0.5)`."""
    details = ", ".join(f"{k} {v}" for k, v in row.detail.items())
    if not row.sources:
        return details
    return f"from {', '.join(row.sources)}{f' ({details})' if details else ''}"


def shape(sizes: Shape | None) -> str:
    """`N×3×8×8`."""
    return "×".join(map(str, sizes or ()))


def passes_of(diff: Diff, row: Row) -> str:
    """The passes that changed a row: `freeze (pass 1, line 7)`."""
    return ", ".join(diff.after.passes[i].label for i in row.passes)


def title(diff: Diff) -> str:
    """What is compared."""
    rewritten = diff.same_backbone and diff.after.title == diff.before.title
    return f"{diff.before.title} → {'rewritten' if rewritten else diff.after.title}"


def glyphs(statuses: Iterable[str], *, unicode: bool = True) -> str:
    """One sign per status, most important first."""
    return "".join(STYLES[s].glyph if unicode else STYLES[s].ascii for s in statuses)


def groups(diff: Diff, *, unfold: bool) -> tuple[RowGroup, ...]:
    """The rows, equal neighbours as one unless `unfold`."""
    return tuple(RowGroup((r,)) for r in diff.rows) if unfold else diff.groups()
