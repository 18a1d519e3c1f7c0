"""Runs compared: grouped by all that is the same but the seed, with means, deviations, and paired differences to a baseline."""

import glob
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graphopt.diff.render.run import Run, is_run, read_run
from graphopt.errors import GraphoptError, RunError, did_you_mean
from graphopt.files import read_text, unsealed
from graphopt.spec import load
from graphopt.studies.running import INDEX, INDEX_VERSION
from graphopt.studies.study import identity

#: accuracies that a comparison can be of
METRICS = ("accuracy", "best_accuracy", "top5_accuracy", "ema_accuracy")


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        accuracy: in 0..1, of the chosen metric. parameters, trainable_parameters: of the last phase.
        flops, forward_flops: of all training steps, forecast. forecast_bytes: the highest peak of a step, forecast.
        measured_bytes: the peak that the run has measured. seconds: of training and evaluation. None: not known.
    """

    run: Run
    seed: int
    accuracy: float
    parameters: int
    trainable_parameters: int
    flops: float | None
    forward_flops: float | None
    forecast_bytes: int | None
    measured_bytes: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """The mean of differences seed by seed, and its standard error (None for one pair)."""

    mean: float
    error: float | None
    pairs: int


@dataclass(frozen=True)
class Row:
    """The runs that differ in their seed only."""

    name: str
    results: tuple[Result, ...]
    missing: int = 0  # runs that have not finished

    def values(self, figure: str) -> list[float]:
        """A figure of each run that has it, in the order of seeds."""
        return [value for result in self.results if (value := getattr(result, figure)) is not None]

    def mean(self, figure: str) -> float | None:
        """The mean of a figure over seeds."""
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """The standard deviation over seeds, of a sample; None for one run."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def less(self, other: "Row", figure: str = "accuracy") -> Difference | None:
        """This row less another, paired by seed; None where they have no seed in common."""
        theirs = {result.seed: result for result in other.results}
        pairs = [(getattr(r, figure), getattr(theirs[r.seed], figure)) for r in self.results if r.seed in theirs]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if not differences:
            return None
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return Difference(statistics.fmean(differences), error, len(differences))

    def ratio(self, other: "Row", figure: str) -> float | None:
        """The mean of a figure over another row's."""
        mine, theirs = self.mean(figure), other.mean(figure)
        return mine / theirs if mine is not None and theirs else None


@dataclass(frozen=True)
class Comparison:
    """Rows, the one that the others are compared with, and published figures beside ours."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    baseline: Row
    published: tuple[Mapping[str, str], ...] = ()

    @cached_property
    def beside(self) -> list[dict[str, str]]:
        """The published figures, each with `ours`."""
        rows = {row.name: row for row in self.rows}
        return [{**item, "ours": _ours(rows.get(item["variant"]), self.baseline, item["figure"])} for item in self.published]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = []
        for row in self.rows:
            less = row.less(self.baseline) if row is not self.baseline else None
            figures = {name: {"mean": row.mean(name), "deviation": row.deviation(name), "each": row.values(name)} for name in FIGURES}
            about = {"name": row.name, "seeds": [r.seed for r in row.results], "missing": row.missing}
            rows.append({**about, **figures, "difference": asdict(less) if less is not None else None})
        head = {"title": self.title, "metric": self.metric, "baseline": self.baseline.name}
        return {**head, "rows": rows, "published": self.beside}


#: figures of a `Result` that have a mean
FIGURES = (
    *("accuracy", "parameters", "trainable_parameters", "flops", "forward_flops"),
    *("forecast_bytes", "measured_bytes", "seconds"),
)
#: what a published figure is compared with, where it is a change against the baseline
_CHANGES = {
    "memory": "forecast_bytes",
    "parameters": "parameters",
    "forward FLOPs": "forward_flops",
    "FLOPs": "flops",
    "time": "seconds",
}


def _ours(row: Row | None, baseline: Row, figure: str) -> str:
    if row is None or not row.results:
        return "not run"
    if figure in ("accuracy", "error"):
        mean = row.mean("accuracy") or 0.0
        return f"{100 * (mean if figure == 'accuracy' else 1 - mean):.2f} %"
    if figure == "points":
        less = row.less(baseline)
        return f"{100 * less.mean:+.2f}" if less is not None else "not known"
    ratio = row.ratio(baseline, _CHANGES[figure])
    return f"{100 * (ratio - 1):+.1f} %" if ratio is not None else "not known"


def compare(what: Sequence[str], *, baseline: str | None = None, metric: str = "accuracy", trust: bool = False) -> Comparison:
    """Compares runs: their folders, the folders of studies, or globs of both.

    Raises RunError for what is neither, where no run has finished, and for a baseline that is no row; and as `read_run`.
    """
    groups: dict[str, list[Path]] = {}
    titles: list[str] = []
    published: list[Mapping[str, str]] = []
    named, plain = baseline, []
    for path in _paths(what):
        index = _index(path)
        if index is None:
            plain.append(path)
            continue
        titles.append(index["name"] or path.name)
        named = named or index["baseline"]
        published += index["published"]
        for run in index["runs"]:
            groups.setdefault(run["row"], []).append(path / run["folder"])
    for name, paths in _grouped(plain, trust).items():
        groups.setdefault(name, []).extend(paths)
    rows = tuple(_row(name, paths, metric) for name, paths in groups.items())
    if not any(row.results for row in rows):
        raise RunError("no run has finished yet", where=", ".join(what), fix="Finish them with --resume, or run the study again")
    names = [row.name for row in rows]
    if named is not None and named not in names:
        fix = did_you_mean(named, names) or f"There are {', '.join(names)}"
        raise RunError(f"there is no row {named!r}", where="--baseline", fix=fix)
    chosen = rows[names.index(named)] if named is not None else next(row for row in rows if row.results)
    return Comparison(", ".join(titles) or "comparison", metric, rows, chosen, tuple(published))


def _paths(what: Sequence[str]) -> list[Path]:
    """The folders that arguments name, globs expanded, each once."""
    found: dict[Path, None] = {}
    for text in what:
        text = os.path.expanduser(text)
        hits = [text] if os.path.exists(text) else sorted(glob.glob(text))
        usable = [Path(hit) for hit in hits if is_run(Path(hit)) or Path(hit, INDEX).is_file()]
        if not hits or (not usable and len(hits) == 1):
            why = "is not the folder of a run or a study" if hits else "no such folder"
            raise RunError(why, where=text, fix="Name folders that `graphopt train` or `graphopt study` wrote")
        found |= dict.fromkeys(usable)
    if not found:
        raise RunError("no run and no study among them", where=", ".join(what), fix="Name folders that `graphopt train` or `study` wrote")
    return list(found)


def _index(path: Path) -> dict[str, Any] | None:
    """What a study's folder says of its runs; None for the folder of a run."""
    if not (path / INDEX).is_file():
        return None
    where, fix = str(path / INDEX), "Run the study again: it writes it anew"
    try:
        found = unsealed(read_text(path / INDEX))
    except (OSError, ValueError) as error:
        raise RunError(f"is damaged: {error}", where=where, fix=fix) from error
    if found.get("study") != INDEX_VERSION:
        what = f"has format {found.get('study')!r}, this version of graphopt reads format {INDEX_VERSION}"
        raise RunError(what, where=where, fix=fix)
    return found


def _grouped(paths: Sequence[Path], trust: bool) -> dict[str, list[Path]]:
    """Runs by all of their spec but the seed, under the shortest name that tells them apart."""
    groups: dict[str, tuple[str, list[Path]]] = {}
    for path in paths:
        index = _index(path.parent)
        row = next((run["row"] for run in index["runs"] if run["folder"] == path.name), None) if index is not None else None
        if row is not None:
            groups.setdefault(f"{path.parent}: {row}", (row, []))[1].append(path)
            continue
        try:
            spec = load(path, trust=trust)
            key, name = identity(spec, seed=False), spec.name
        except GraphoptError:  # of a plan that was compiled by hand, or of code that is not trusted: a row of its own
            key, name = str(path), ""
        groups.setdefault(key, (name or path.name, []))[1].append(path)
    names = [name for name, _ in groups.values()]
    # Runs of one spec with other settings have its name: their folders tell them apart.
    return {name if names.count(name) == 1 else paths[0].name: paths for name, paths in groups.values()}


def _row(name: str, paths: Sequence[Path], metric: str) -> Row:
    results, missing = [], 0
    for path in paths:
        run = read_run(path) if is_run(path) else None
        if run is None or run.summary is None:
            missing += 1
            continue
        results.append(_result(run, metric))
    return Row(name, tuple(sorted(results, key=lambda result: result.seed)), missing)


def _result(run: Run, metric: str) -> Result:
    summary: Mapping[str, Any] = run.summary or {}
    accuracy = summary.get(metric)
    if accuracy is None:
        raise RunError(f"the run has no {metric}", where=str(run.path), fix=f"Compare another figure: {', '.join(METRICS)}")
    train = (summary.get("spec") or {}).get("train", {})
    steps = _phase_steps(summary)
    costs = [phase.get("forecast") for phase in summary.get("phases", ())]
    known = bool(costs) and all(costs)

    def total(flops: Callable[[Mapping[str, Any]], int]) -> float | None:
        return float(sum(count * flops(cost) for count, cost in zip(steps, costs, strict=True))) if known else None

    return Result(
        run=run,
        seed=train.get("seed", 0),
        accuracy=accuracy,
        parameters=summary["parameters"],
        trainable_parameters=summary["trainable_parameters"],
        flops=total(lambda cost: cost["forward_flops"] + cost["backward_flops"]),
        forward_flops=total(lambda cost: cost["forward_flops"]),
        forecast_bytes=max(cost["peak_bytes"] for cost in costs) if known else None,
        measured_bytes=summary["peak_bytes"],
        seconds=summary["seconds"],
    )


def _phase_steps(summary: Mapping[str, Any]) -> list[int]:
    """How many steps each phase of a run took."""
    starts = [phase["step"] for phase in summary.get("phases", ())]
    return [end - start for start, end in zip(starts, [*starts[1:], summary["steps"]], strict=True)]
