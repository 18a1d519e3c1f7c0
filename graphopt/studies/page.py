"""A comparison as one HTML page that needs no network and no other files: table, trade-offs, curves, and the diffs side by side."""

import html
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from graphopt.diff.phases import phase_diffs
from graphopt.diff.render.data import as_script
from graphopt.diff.render.page import escaped, filled, for_page, scripts, to_html, web
from graphopt.driver import compile
from graphopt.errors import GraphoptError
from graphopt.spec import load
from graphopt.studies.comparing import Comparison, Row
from graphopt.studies.tables import Table, note, published, table

MIB = 2**20
#: colours by their names in colours.json; rows beyond them repeat the colours with another dash
COLOURS = ("rank0", "rank1", "rank2", "stop", "rank3", "muted")
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 4), (2, 3))


def to_page(comparison: Comparison, *, trust: bool = False, costs: bool = True) -> str:
    """The page; `costs` are those in the diffs. A row whose spec cannot be compiled again (without `trust`, say) has the reason there."""
    rows = [row for row in comparison.rows if row.results]
    count = sum(len(row.results) for row in rows)
    styles = [
        {"name": row.name, "colour": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        for i, row in enumerate(rows)
    ]
    beside = published(comparison)
    values = {
        "TITLE": escaped(comparison.title),
        "SUBTITLE": escaped(
            f"{len(rows)} rows, {count} runs{f', compared with {comparison.common.name}' if comparison.common is not None else ''}"
        ),
        "STYLE": for_page("vendor/uPlot.min.css", "report.css", "compare.css"),
        "TABLE": _table(table(comparison), {row.name for row in comparison.baselines.values()}),
        "NOTE": escaped(note(comparison)),
        "PUBLISHED": f'<h2>Published figures</h2><div class="wide"><table class="figures published">{_table(beside)}</table></div>'
        if beside is not None
        else "",
        "KEYS": "".join(map(_key, styles)),
        "DIFFS": "".join(_diff(row, trust, costs) for row in rows),
        "DATA": as_script({"rows": styles, "charts": charts(rows)}),
        "SCRIPTS": scripts("vendor/uPlot.iife.min.js", "compare.js"),
    }
    return filled(web("compare.html"), values)


def charts(rows: Sequence[Row]) -> dict[str, Any]:
    """What the four charts draw, by their names; `row` is the number of a row."""
    return {
        "forecast": _points(rows, "forecast_bytes", MIB),
        "time": _points(rows, "seconds", 1),
        "accuracy": _curves(rows, "accuracy", 100),
        "loss": _curves(rows, "train_loss", 1),
    }


def _points(rows: Sequence[Row], figure: str, unit: float) -> dict[str, Any]:
    points = []
    for number, row in enumerate(rows):
        x, y = row.mean(figure), row.mean("accuracy")
        if x is not None and y is not None:
            spread = {"dx": (row.deviation(figure) or 0) / unit, "dy": 100 * (row.deviation("accuracy") or 0)}
            points.append({"row": number, "x": x / unit, "y": 100 * y, **spread})
    return {"points": points}


def _curves(rows: Sequence[Row], key: str, factor: float) -> dict[str, Any]:
    """One curve per row: at the end of each epoch, the mean over the runs that have the figure there, and the deviation around it."""
    found = []
    for number, row in enumerate(rows):
        by_epoch: dict[int, list[float]] = {}
        for result in row.results:
            for record in result.run.epochs:
                if isinstance(record.get(key), int | float):
                    by_epoch.setdefault(int(record["epoch"]) + 1, []).append(factor * record[key])
        if by_epoch:
            found.append((number, by_epoch))
    xs = sorted({epoch for _, by_epoch in found for epoch in by_epoch})
    return {"x": xs, "series": [_curve(number, by_epoch, xs) for number, by_epoch in found]}


def _curve(row: int, by_epoch: Mapping[int, Sequence[float]], xs: Sequence[int]) -> dict[str, Any]:
    curve: dict[str, Any] = {"row": row, "y": [], "low": [], "high": []}
    for x in xs:
        values = by_epoch.get(x)
        mean = statistics.fmean(values) if values else None
        spread = statistics.stdev(values) if values and len(values) > 1 else 0.0
        curve["y"].append(mean)
        curve["low"].append(None if mean is None else mean - spread)
        curve["high"].append(None if mean is None else mean + spread)
    return curve


def _table(found: Table, baselines: Collection[str] = ()) -> str:
    head = "".join(f"<th>{escaped(title)}</th>" for title in found.titles)
    lines = []
    for row in found.rows:
        kind = ' class="baseline"' if row[0] in baselines else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>")
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _key(style: Mapping[str, Any]) -> str:
    dash = ",".join(map(str, style["dash"])) or "none"
    line = f'<line x1="1" y1="5" x2="25" y2="5" stroke="var(--{style["colour"]})" stroke-width="2.5" stroke-dasharray="{dash}"/>'
    return f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{line}</svg>{escaped(style["name"])}</li>'


def _diff(row: Row, trust: bool, costs: bool) -> str:
    """What the first run of a row did to the graph, or why that cannot be shown."""
    run = row.results[0].run
    try:
        spec = load(run.path, trust=trust)
        torch.manual_seed(spec.train.seed)
        plan = compile(None, spec, verify="off", costs=costs, trust=trust)
        page = html.escape(to_html(phase_diffs(plan, run.decisions)))
    except GraphoptError as error:
        return f'<div><h3>{escaped(row.name)}</h3><p class="note">{escaped(str(error))}</p></div>'
    return f'<div><h3>{escaped(row.name)}</h3><iframe title="{escaped(row.name)}: the diff" loading="lazy" srcdoc="{page}"></iframe></div>'
