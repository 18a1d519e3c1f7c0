"""A comparison as a table: for the terminal, Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from graphopt.studies.comparing import FIGURES, Comparison, Row
from graphopt.units import show_count, show_size, show_time

_METRICS = {
    "accuracy": "accuracy, %",
    "best_accuracy": "best accuracy, %",
    "top5_accuracy": "top-5 accuracy, %",
    "ema_accuracy": "accuracy of averages, %",
}


class Table(NamedTuple):
    """Titles of columns, and rows of texts; all columns but the first hold figures."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(comparison: Comparison) -> Table:
    """The comparison for reading. A figure in brackets is the ratio to the baseline's; a dash is not known."""
    baseline = comparison.baseline
    titles = (
        *("", "seeds", _METRICS[comparison.metric], f"less {baseline.name}"),
        *("parameters", "training FLOPs", "memory, forecast", "measured", "time"),
    )
    return Table(titles, tuple(_cells(row, baseline) for row in comparison.rows))


def _cells(row: Row, baseline: Row) -> tuple[str, ...]:
    seeds = f"{len(row.results)}{f' of {len(row.results) + row.missing}' if row.missing else ''}"

    def figure(name: str, words: Callable[[float], str]) -> str:
        mean = row.mean(name)
        if mean is None:
            return "–"
        ratio = row.ratio(baseline, name)
        return words(mean) + (f" ({ratio:.2f})" if row is not baseline and ratio is not None else "")

    return (
        *(row.name, seeds, _accuracy(row), _difference(row, baseline)),
        *(figure("parameters", show_count), figure("flops", show_count)),
        *(figure("forecast_bytes", show_size), figure("measured_bytes", show_size), figure("seconds", show_time)),
    )


def _accuracy(row: Row) -> str:
    mean, deviation = row.mean("accuracy"), row.deviation("accuracy")
    if mean is None:
        return "–"
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def _difference(row: Row, baseline: Row) -> str:
    less = row.less(baseline) if row is not baseline else None
    if less is None:
        return "" if row is baseline else "–"
    return f"{100 * less.mean:+.2f}" + (f" ± {100 * less.error:.2f}" if less.error is not None else "")


def note(comparison: Comparison) -> str:
    """What the figures mean, in one sentence or two."""
    text = "After ±: the standard deviation over seeds, and of a difference, which is paired by seed, the standard error. "
    return text + f"In brackets: over {comparison.baseline.name}'s."


def published(comparison: Comparison) -> Table | None:
    """The published figures beside ours; None where there are none."""
    if not comparison.published:
        return None
    rows = tuple((p["variant"], p["figure"], p["value"], p["ours"], p["source"]) for p in comparison.beside)
    return Table(("row", "figure", "published", "ours", "source"), rows)


def markdown(comparison: Comparison) -> str:
    """The tables in Markdown."""
    parts = [_markdown(table(comparison)), note(comparison)]
    beside = published(comparison)
    return "\n\n".join([*parts, *([_markdown(beside)] if beside is not None else [])]) + "\n"


def _markdown(found: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(found.titles) - 1) + "|"
    return "\n".join([line(found.titles), rule, *map(line, found.rows)])


def to_csv(comparison: Comparison) -> str:
    """Every figure as a plain number, one line a row: accuracies in 0..1, bytes, seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [name for name in FIGURES if name != "accuracy"]
    head = ("row", "seeds", "missing", comparison.metric, "deviation", "difference", "standard_error")
    writer.writerow([*head, *figures])
    for row in comparison.rows:
        less = row.less(comparison.baseline) if row is not comparison.baseline else None
        values = [row.mean("accuracy"), row.deviation("accuracy"), *((less.mean, less.error) if less is not None else (None, None))]
        values += [row.mean(name) for name in figures]
        writer.writerow([row.name, len(row.results), row.missing, *("" if value is None else f"{value:.10g}" for value in values)])
    return text.getvalue()


def latex(comparison: Comparison) -> str:
    """A tabular with the rules of the package booktabs."""
    found = table(comparison)
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(found.titles) - 1)}}}", "\\toprule", _tex(found.titles), "\\midrule"]
    lines += [*map(_tex, found.rows), "\\bottomrule", "\\end{tabular}", f"% {note(comparison)}"]
    return "\n".join(lines) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}


def _tex(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"[\\~^–±]|[&%$#_{}]", lambda m: _TEX.get(m[0], f"\\{m[0]}"), cell) for cell in cells)
    # A minus in text would be set as a hyphen.
    return " & ".join(re.sub(r"^-(?=\d)", "$-$", cell) for cell in escaped) + r" \\"
