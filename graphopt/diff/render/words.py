"""Figures and phrases that all renderings share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.diff.join import Diff, Fold
from graphopt.diff.rows import PassLine, Row
from graphopt.diff.status import look
from graphopt.units import show_count, show_size

#: figure -> (title, how it is written)
SHOWN = {
    "parameters": ("parameters", show_count),
    "trainable_parameters": ("trainable", show_count),
    "forward_flops": ("forward FLOPs", show_count),
    "backward_flops": ("backward FLOPs", show_count),
    "saved_activation_bytes": ("saved activations", show_size),
    "peak_bytes": ("peak memory", show_size),
    "peak_activation_bytes": ("peak activations", show_size),
}


def amount(key: str, value: int) -> str:
    """A figure as people write it: `11.2 M`, `374 MiB`."""
    return SHOWN[key][1](value)


def change(before: int, after: int) -> str:
    """`-43 %`, `+2.1 %`, `=`, `≈` (under half a thousandth); from nothing, `new`."""
    if before == after:
        return "="
    if not before:
        return "new"
    percent = 100 * (after - before) / before
    if abs(percent) < 0.05:
        return "≈"
    return f"{percent:+.0f} %" if abs(percent) >= 10 or percent == int(percent) else f"{percent:+.1f} %"


def total(rows: Sequence[Row], key: str, side: str) -> int | None:
    """A figure summed over rows; None where no row has it."""
    values = [f[key] for r in rows if (f := getattr(r, side)) is not None and key in f]
    return sum(values) if values else None


def statuses(row: Row) -> str:
    """`frozen + isolated`, or, where the sides differ, `kept -> frozen`."""
    now = " + ".join(row.statuses)
    bare = row.was in (("kept",), (), row.statuses)
    return now if bare else f"{' + '.join(row.was)} → {now}"


def facts(row: Row) -> str:
    """Sources and details in one phrase: `from layer1.0, layer1.2 (a 0.5, b 0.5)`."""
    parts = []
    if row.sources:
        parts.append(f"from {', '.join(row.sources)}")
    if row.detail:
        said = ", ".join(f"{k} {v}" for k, v in row.detail.items())
        parts.append(f"({said})" if row.sources else said)
    return " ".join(parts)


def shape(sizes: Sequence[str | int] | None) -> str:
    return "×".join(map(str, sizes)) if sizes else ""


def passes_of(row: Row, lines: Sequence[PassLine]) -> str:
    return ", ".join(lines[i].place for i in row.passes if i < len(lines))


def title(diff: Diff) -> str:
    return f"{diff.before.title} → {diff.after.title if diff.after.title != diff.before.title else 'rewritten'}"


def glyph(row: Row, *, unicode: bool = True) -> str:
    """One sign per status, weightiest first."""
    return "".join(look(s).glyph if unicode else look(s).ascii for s in row.statuses)


def summary(totals: Mapping[str, int] | None, after: Mapping[str, int] | None) -> list[tuple[str, str, str, str]]:
    """(title, before, after, change) of every figure both sides have."""
    if totals is None or after is None:
        return []
    both = [k for k in SHOWN if k in totals and k in after]
    return [(SHOWN[k][0], amount(k, totals[k]), amount(k, after[k]), change(totals[k], after[k])) for k in both]


def folds(diff: Diff, *, unfold: bool) -> tuple[Fold, ...]:
    return tuple(Fold(r.name, (r,)) for r in diff.rows) if unfold else diff.folded()
