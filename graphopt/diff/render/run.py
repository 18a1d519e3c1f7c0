"""A run's folder read, and shown as one HTML page: its curves, its phases and decisions, and the diff."""

import html
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.diff.phases import phase_diffs
from graphopt.diff.render.chain import chain_section
from graphopt.diff.render.data import as_script
from graphopt.diff.render.page import escaped, filled, for_page, scripts, to_html, web
from graphopt.diff.render.settings import csv_links, settings_section
from graphopt.errors import RunError, listed
from graphopt.files import read_text, reason, unsealed
from graphopt.hashing import hash_parts
from graphopt.train.folder import MANIFEST, RunFolder, check_entries, read_manifest
from graphopt.train.ledger import EpochCheck, check_ledger
from graphopt.units import show_count, show_size, show_time

#: points in one curve at most: more than a screen has columns
POINTS = 1500
MIB = 2**20


_FIX = "Name the folder that `graphopt train` wrote"


@dataclass(frozen=True)
class Run:
    """One run: the records of its metrics.jsonl by kind, in order, its ledger, and its summary.json, which is None while it goes on."""

    path: Path
    epochs: tuple[Mapping[str, Any], ...]
    steps: tuple[Mapping[str, Any], ...]
    phases: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] | None
    ledger: tuple[EpochCheck, ...] = ()  # what each epoch took, where the run has recorded it

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All that was decided, in order."""
        records = (d for phase in self.phases for d in phase.get("decisions", ()))
        return tuple(dict.fromkeys(Decision.model_validate({k: d[k] for k in d if k in Decision.model_fields}) for d in records))


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run: it has a manifest, or checkpoints of one that has lost it."""
    return path.is_dir() and ((path / MANIFEST).is_file() or bool(RunFolder(path).checkpoints()))


def read_run(path: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        RunError: the folder does not exist, is not a run, or its metrics or its ledger cannot be read.
    """
    if not path.exists():
        raise RunError("no such folder", where=str(path), fix=_FIX)
    if not path.is_dir():
        raise RunError("a file, not the folder of a run", where=str(path), fix=_FIX)
    check_entries(path, links=True)
    if not is_run(path):
        raise RunError("no run of graphopt: it has no run.json and no checkpoint", where=str(path), fix=_FIX)
    for name in (MANIFEST, "spec.toml"):
        if not (path / name).is_file():
            raise RunError(f"the run has lost its {name}", where=str(path), fix="Resume the run, which writes it anew")
    manifest = read_manifest(path)
    if manifest is None:
        raise RunError("is damaged", where=str(path / MANIFEST), fix="Resume the run, which writes it anew")
    check_spec(path, manifest)
    records = _records(path / "metrics.jsonl")
    summary = _text(path / "summary.json")
    try:
        finished = unsealed(summary) if summary else None
    except ValueError as error:
        raise RunError(f"is damaged: {error}", where=str(path / "summary.json"), fix="Remove it, or resume the run") from error
    if finished is not None and finished.get("epochs", 0) > 1 + max((record.get("epoch", 0) for record in records["epoch"]), default=-1):
        what = f"is cut short: the run has finished {finished['epochs']} epochs"
        raise RunError(what, where=str(path / "metrics.jsonl"), fix="Restore it, or remove summary.json to see what there is")
    book, steps = path / "ledger.bin", finished.get("steps") if finished else None
    ledger = check_ledger(book, steps) if book.exists() else ()
    return Run(path, tuple(records["epoch"]), tuple(records["step"]), tuple(records["phase"]), finished, ledger)


def check_spec(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises RunError if the spec in a run's folder is not the one that it was trained with, as its manifest knows it."""
    if hash_parts((path / "spec.toml").read_bytes()) != manifest.get("spec", ...):
        what = "is not what the run was trained with: it was changed since"
        raise RunError(what, where=str(path / "spec.toml"), fix="Restore it: every checkpoint of the run holds it")


def _records(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The records of a metrics file by kind; a last line that was cut off in writing is passed over."""
    records: dict[str, list[Mapping[str, Any]]] = {"epoch": [], "step": [], "phase": []}
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = unsealed(line)
            kind = record["kind"]
        except (ValueError, KeyError) as error:
            if number < len(lines) or line.endswith("}"):
                raise RunError("not a line of metrics, or damaged", where=f"{path}:{number}", fix="Remove the line") from error
            continue
        if kind in records:
            records[kind].append(record)
    return records


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot be read: {reason(error)}", where=str(path)) from error


def to_report(run: Run, plan: Plan) -> str:
    """The page of a run; `plan` is of its spec, in its first phase."""
    phases = phase_diffs(plan, run.decisions)
    forecast = [(p.epoch, p.diff.after.totals["peak_bytes"]) for p in phases if p.diff.after.totals]
    title = plan.name or run.path.name
    spec = plan.spec
    facts = [f"run {run.path.name}", f"{spec.backbone.source} {spec.backbone.name}", f"digest {plan.digest}"] if spec is not None else []
    if run.summary:
        facts.append(str(run.summary.get("device", "")))
    lines = [{"epoch": p.get("epoch", 0), "label": ", ".join(dict.fromkeys(map(_label, p.get("decisions", ()))))} for p in run.phases]
    values = {
        "TITLE": escaped(title),
        "SUBTITLE": escaped(" · ".join(t for t in facts if t)),
        "STYLE": for_page("vendor/uPlot.min.css", "report.css"),
        "TILES": "".join(_tile(*tile) for tile in _tiles(run, forecast)),
        "NOTE": "" if run.summary else '<p class="note">This run has not finished: the page shows what there is.</p>',
        "PHASES": "".join(_phase_row(p) for p in run.phases) or "<tr><td>0</td><td>nothing yet</td><td></td><td></td></tr>",
        "CHAIN": chain_section(run.epochs),
        "LEDGER": "".join(f"<li>{escaped(str(epoch))}</li>" for epoch in run.ledger) or "<li>not recorded (train.ledger = true does)</li>",
        "SETTINGS": settings_section(spec, _text(run.path / "spec.toml"), run.summary),
        "CSV": csv_links(run.epochs, run.steps),
        "DIFF": html.escape(to_html(phases)),
        "DATA": as_script({"phases": lines, "charts": charts(run, forecast), "until": max(1, len(run.epochs))}),
        "SCRIPTS": scripts("vendor/uPlot.iife.min.js", "report.js"),
    }
    return filled(web("report.html"), values)


def charts(run: Run, forecast: Sequence[tuple[float, int]] = ()) -> dict[str, Any]:
    """The curves of the four charts over epochs; a step lies at the fraction of its epoch that it ends.

    Args:
        forecast: the first epoch of each phase, and the forecast peak of its steps in bytes.
    """
    ends = [0, *(int(r["step"]) for r in run.epochs)]
    # How long an epoch that has not ended is: as the one before, or all there is so far.
    length = ends[-1] - ends[-2] if len(ends) > 1 else 1 + max((int(r["step"]) for r in run.steps), default=1)

    def at(record: Mapping[str, Any]) -> float:
        step = int(record["step"])
        number = min(bisect_right(ends, step) - 1, len(ends) - 1)
        start = ends[number]
        if number + 1 < len(ends):
            return number + (step - start) / max(1, ends[number + 1] - start)
        return number + min(1.0, (step - start) / max(1, length))

    def steps(key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return _thinned([(at(r), factor * float(r[key])) for r in run.steps if _number(r.get(key))])

    def epochs(key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(int(r["epoch"]) + 1.0, factor * float(r[key])) for r in run.epochs if _number(r.get(key))]

    until = max([len(run.epochs), *(start + 1 for start, _ in forecast)])
    ends_of = [*(start - 1e-4 for start, _ in forecast[1:]), until]
    expected = [(x, peak / MIB) for (start, peak), end in zip(forecast, ends_of, strict=False) for x in (start, end)]
    lengths = {int(r["epoch"]): end - start for r, start, end in zip(run.epochs, ends, ends[1:], strict=False)}
    # A run too short for a record of its steps has the means of its epochs.
    means = [(x, seconds / max(1, lengths[int(x) - 1])) for x, seconds in epochs("seconds", 1000)]
    training, accuracy = steps("loss") or epochs("train_loss"), steps("accuracy", 100) or epochs("train_accuracy", 100)
    local = steps("local_loss") or epochs("train_local_loss")
    losses = {"training": training, "evaluation": epochs("loss"), "averaged weights": epochs("ema_loss"), "local losses": local}
    return {
        "loss": _chart(losses),
        "accuracy": _chart({"training": accuracy, "evaluation": epochs("accuracy", 100), "averaged weights": epochs("ema_accuracy", 100)}),
        "time": _chart({"step": steps("step_seconds", 1000) or means}, zero=True),
        "memory": _chart({"measured": steps("peak_bytes", 1 / MIB) or epochs("peak_bytes", 1 / MIB), "forecast": expected}, zero=True),
    }


def _chart(curves: Mapping[str, Sequence[tuple[float, float]]], *, zero: bool = False) -> dict[str, Any]:
    """The form that uPlot takes: one sorted x, and per series a y or null at each."""
    drawn = {name: dict(points) for name, points in curves.items() if points}
    xs = sorted({round(x, 4) for points in drawn.values() for x in points})
    series = []
    for name, points in drawn.items():
        by_x = {round(x, 4): round(y, 6) for x, y in points.items()}
        series.append({"name": name, "y": [by_x.get(x) for x in xs], "points": len(by_x) <= 60})
    values = [y for points in drawn.values() for y in points.values()]
    # Where one curve leaves the others far below (a first evaluation with young norms), only a logarithmic scale shows both.
    log = not zero and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
    return {"x": xs, "series": series, "zero": zero, "log": log}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that no more than POINTS are left."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


def _tiles(run: Run, forecast: Sequence[tuple[float, int]]) -> Iterable[tuple[str, str, str]]:
    last, done = (run.epochs[-1] if run.epochs else {}), run.summary or {}
    if _number(accuracy := done.get("accuracy", last.get("accuracy"))):
        best = done.get("best_accuracy")
        small = f"best {100 * best:.2f} % in epoch {done['best_epoch']}" if _number(best) else ""
        yield "accuracy", f"{100 * accuracy:.2f} %", small
    if _number(loss := done.get("loss", last.get("loss"))):
        yield "loss", f"{loss:.4f}", "evaluation"
    if (seconds := done.get("seconds") or sum(float(r.get("seconds", 0)) for r in run.epochs)) > 0:
        yield "time", show_time(seconds), f"{len(run.epochs)} epochs, {last.get('step', 0)} steps"
    if _number(peak := done.get("peak_bytes", last.get("peak_bytes"))) and peak:
        expected = max((size for _, size in forecast), default=0)
        yield "peak memory", show_size(peak), f"forecast {show_size(expected)}" if expected else str(done.get("device", ""))
    if run.ledger:
        wrong = [str(epoch.epoch) for epoch in run.ledger if not epoch.right]
        yield (
            "samples",
            f"wrong in {len(wrong)} epochs" if wrong else "exactly once",
            f"epoch {listed(wrong)}" if wrong else "in each epoch",
        )
    if run.phases:
        first, now = run.phases[0].get("trainable_parameters"), run.phases[-1].get("trainable_parameters")
        if _number(first) and _number(now):
            yield "trainable", show_count(now), f"{show_count(first)} at the start" if now != first else "parameters"


def _tile(what: str, big: str, small: str) -> str:
    return (
        f'<div class="tile" role="listitem"><div class="what">{escaped(what)}</div>'
        f'<div class="big">{escaped(big)}</div><div class="small">{escaped(small)}</div></div>'
    )


def _label(decision: Mapping[str, Any]) -> str:
    use = str(decision.get("pass", f"pass {decision.get('index', 0) + 1}"))
    return use if decision.get("action", "apply") == "apply" else f"{use} undone"


def _phase_row(phase: Mapping[str, Any]) -> str:
    decisions = phase.get("decisions", ())
    regions = "; ".join(", ".join(d.get("regions") or ["all it selects"]) for d in decisions)
    label = "; ".join(_label(d) for d in decisions) or "start"
    trainable = phase.get("trainable_parameters")
    cells = [str(phase.get("epoch", 0)), label, regions, show_count(trainable) if _number(trainable) else ""]
    return f"<tr>{''.join(f'<td>{escaped(c)}</td>' for c in cells)}</tr>"
