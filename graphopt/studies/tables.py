"""A comparison as a table: for the terminal, Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
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
    several = comparison.common is None
    titles = (
        *("", *(("compared with",) if several else ()), "seeds", _METRICS[comparison.metric], "difference"),
        *("parameters", "training FLOPs", "memory, forecast", "measured", "time"),
    )
    return Table(titles, tuple(_cells(row, comparison, several) for row in comparison.rows))


def _cells(row: Row, comparison: Comparison, several: bool) -> tuple[str, ...]:
    seeds = f"{len(row.results)}{f' of {len(row.results) + row.missing}' if row.missing else ''}"
    baseline, itself = comparison.baselines[row.name], comparison.is_baseline(row)

    def figure(name: str, words: Callable[[float], str]) -> str:
        mean = row.mean(name)
        if mean is None:
            return "–"
        ratio = row.ratio(baseline, name)
        return words(mean) + (f" ({ratio:.2f})" if not itself and ratio is not None else "")

    return (
        *(row.name, *(("" if itself else baseline.name,) if several else ()), seeds, _accuracy(row), _difference(row, comparison)),
        *(figure("parameters", show_count), figure("flops", show_count)),
        *(figure("forecast_bytes", show_size), figure("measured_bytes", show_size), figure("seconds", show_time)),
    )


def _accuracy(row: Row) -> str:
    mean, deviation = row.mean("accuracy"), row.deviation("accuracy")
    if mean is None:
        return "–"
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def _difference(row: Row, comparison: Comparison) -> str:
    if comparison.is_baseline(row):
        return ""
    less = comparison.difference(row)
    if less is None:
        return "–"
    return f"{100 * less.mean:+.2f}" + (f" ± {100 * less.error:.2f}" if less.error is not None else "")


def note(comparison: Comparison) -> str:
    """What the figures mean, in one sentence or two."""
    to = comparison.common.name if comparison.common is not None else "the row that it is compared with"
    text = f"The difference is to {to}, paired by seed; in brackets is the ratio to it. "
    text += "After ±: the standard deviation over seeds, and of a difference the standard error."
    return text + "".join(f" Left out: {why}." for why in comparison.left_out)


def published(comparison: Comparison) -> Table | None:
    """The published figures beside ours; None where there are none."""
    if not comparison.published:
        return None
    rows = tuple((p["variant"], p["figure"], p["against"], p["value"], p["ours"], p["source"]) for p in comparison.beside)
    return Table(("row", "figure", "against", "published", "ours", "source"), rows)


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
    """Every figure as a plain number, one line a row: accuracies in 0..1, bytes, seconds; published figures as they were published."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [name for name in FIGURES if name != "accuracy"]
    head = ("row", "baseline", "seeds", "missing", comparison.metric, "deviation", "difference", "standard_error")
    beside = {(item["variant"], item["figure"]): item["value"] for item in comparison.beside}
    theirs = list(dict.fromkeys(figure for _, figure in beside))
    writer.writerow([*head, *figures, *(f"published {figure}" for figure in theirs)])
    for row in comparison.rows:
        less = comparison.difference(row)
        values = [row.mean("accuracy"), row.deviation("accuracy"), *((less.mean, less.error) if less is not None else (None, None))]
        values += [row.mean(name) for name in figures]
        about = (row.name, comparison.baselines[row.name].name, len(row.results), row.missing)
        plain = ("" if value is None else f"{value:.10g}" for value in values)
        writer.writerow([*about, *plain, *(beside.get((row.name, figure), "") for figure in theirs)])
    return text.getvalue()


def latex(comparison: Comparison) -> str:
    """Tabulars with the rules of the package booktabs."""
    beside = published(comparison)
    lines = [*_tabular(table(comparison)), f"% {note(comparison)}", *(_tabular(beside) if beside is not None else ())]
    return "\n".join(lines) + "\n"


def _tabular(found: Table) -> list[str]:
    head = [f"\\begin{{tabular}}{{l{'r' * (len(found.titles) - 1)}}}", "\\toprule", _tex(found.titles), "\\midrule"]
    return [*head, *map(_tex, found.rows), "\\bottomrule", "\\end{tabular}"]


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}


def _tex(cells: Sequence[str]) -> str:
    escaped = (re.sub(r"[\\~^–±]|[&%$#_{}]", lambda m: _TEX.get(m[0], f"\\{m[0]}"), cell) for cell in cells)
    # A minus in text would be set as a hyphen.
    return " & ".join(re.sub(r"^-(?=\d)", "$-$", cell) for cell in escaped) + r" \\"


#: what writes a comparison, by the ending of a file's name; pages are not made here
FORMS: Mapping[str, Callable[[Comparison], str]] = {".md": markdown, ".csv": to_csv, ".tex": latex}
