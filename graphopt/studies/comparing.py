"""Runs compared: grouped by all that is the same but the seed, with means, deviations, and paired differences to a baseline."""

import glob
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
class Published:
    """A published figure: its row, and the row that it is a change against (None: a figure by itself, or of a row that is not here)."""

    row: str
    figure: str
    value: str
    source: str
    against: Row | None


@dataclass(frozen=True)
class Comparison:
    """Rows, the row that each is compared with, and published figures beside ours."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    baselines: Mapping[str, Row]  # of each row, by its name
    published: tuple[Published, ...] = ()
    left_out: tuple[str, ...] = ()  # runs that cannot be read, and why

    @cached_property
    def common(self) -> Row | None:
        """The row that all others are compared with; None if there are several."""
        found = {row.name: row for row in self.baselines.values()}
        return next(iter(found.values())) if len(found) == 1 else None

    def is_baseline(self, row: Row) -> bool:
        """Whether a row is compared with itself."""
        return self.baselines[row.name].name == row.name

    def difference(self, row: Row) -> Difference | None:
        """A row less its baseline; None for a baseline, and where they have no seed in common."""
        return None if self.is_baseline(row) else row.less(self.baselines[row.name])

    @cached_property
    def beside(self) -> list[dict[str, str]]:
        """The published figures, each with `ours`."""
        rows = {row.name: row for row in self.rows}
        return [
            {
                "variant": item.row,
                "figure": item.figure,
                "against": item.against.name if item.against is not None else "",
                "value": item.value,
                "ours": _ours(rows.get(item.row), item.against, item.figure),
                "source": item.source,
            }
            for item in self.published
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = []
        for row in self.rows:
            less = self.difference(row)
            figures = {name: {"mean": row.mean(name), "deviation": row.deviation(name), "each": row.values(name)} for name in FIGURES}
            about = {"name": row.name, "baseline": self.baselines[row.name].name, "seeds": [r.seed for r in row.results]}
            rows.append({**about, "missing": row.missing, **figures, "difference": asdict(less) if less is not None else None})
        return {"title": self.title, "metric": self.metric, "rows": rows, "published": self.beside, "left_out": list(self.left_out)}


#: figures of a `Result` that have a mean
FIGURES = (
    *("accuracy", "parameters", "trainable_parameters", "flops", "forward_flops"),
    *("forecast_bytes", "measured_bytes", "seconds"),
)
#: what a published figure is compared with, where it is a change against the baseline
CHANGES = {
    "memory": "forecast_bytes",
    "parameters": "parameters",
    "forward FLOPs": "forward_flops",
    "FLOPs": "flops",
    "time": "seconds",
}


#: published figures that are no change against another row
ABSOLUTE = ("accuracy", "error")


def _ours(row: Row | None, against: Row | None, figure: str) -> str:
    if row is None or not row.results:
        return "not run"
    if figure in ABSOLUTE:
        mean = row.mean("accuracy") or 0.0
        return f"{100 * (mean if figure == 'accuracy' else 1 - mean):.2f} %"
    if against is None or not against.results:
        return "not run"
    if figure == "points":
        less = row.less(against)
        return f"{100 * less.mean:+.2f}" if less is not None else "not known"
    ratio = row.ratio(against, CHANGES[figure])
    return f"{100 * (ratio - 1):+.1f} %" if ratio is not None else "not known"


def compare(what: Sequence[str], *, baseline: str | None = None, metric: str = "accuracy", trust: bool = False) -> Comparison:
    """Compares runs: their folders, the folders of studies, or globs of both. Rows of studies are compared with what their studies say.

    Raises RunError for what is neither, where no run has finished, and for a baseline that is no row; and as `read_run`.

    Args:
        baseline: the row that all are compared with, instead of those that studies name, and of the first.
    """
    groups, titles, left_out = _Groups(trust), [], list[str]()
    paths = _paths(what)
    for path, by_name in paths.items():
        with _tolerated(None if by_name else left_out):
            index = _index(path)
            if index is None:
                groups.add_run(path)
                continue
            groups.add_study(path, index)
            titles.append(index["name"] or path.name)
    rows = {}
    for key, name in groups.names().items():
        runs = []
        for path in groups.paths[key]:
            with _tolerated(None if paths.get(path) else left_out):
                runs.append(read_run(path) if is_run(path) else None)
        rows[key] = _row(name, runs, len(groups.paths[key]), metric)
    if not any(row.results for row in rows.values()):
        why = f" ({left_out[0]})" if left_out else ""
        raise RunError(f"no run has finished yet{why}", where=", ".join(what), fix="Finish them with --resume, or run the study again")
    named = {row.name: row for row in rows.values()}
    if baseline is not None and baseline not in named:
        fix = did_you_mean(baseline, named) or f"There are {', '.join(named)}"
        raise RunError(f"there is no row {baseline!r}", where="--baseline", fix=fix)
    first = named[baseline] if baseline is not None else next(row for row in rows.values() if row.results)
    chosen = {} if baseline is not None else groups.baselines
    baselines = {row.name: rows[chosen[key]] if key in chosen else first for key, row in rows.items()}
    published = tuple(_published(item, rows) for item in groups.published)
    return Comparison(", ".join(titles) or "comparison", metric, tuple(rows.values()), baselines, published, tuple(left_out))


def _published(item: Mapping[str, Any], rows: Mapping[str, Row]) -> Published:
    against = None if item["figure"] in ABSOLUTE else rows[item["against"]]
    return Published(rows[item["variant"]].name, item["figure"], item["value"], item["source"], against)


class _Groups:
    """Runs by all of their spec but the seed: those of a study's row are one group, and so is a row of another folder that is the same."""

    def __init__(self, trust: bool) -> None:
        self.trust = trust
        self.paths: dict[str, list[Path]] = {}
        self.baselines: dict[str, str] = {}  # of groups in studies
        self.published: list[dict[str, Any]] = []  # as studies name them, but with groups in the place of rows
        self._names: dict[str, tuple[str, str, str]] = {}  # names of a group, the shortest first; the last is its alone

    def add_run(self, path: Path) -> None:
        index = _index(path.parent)
        row = next((run["row"] for run in index["runs"] if run["folder"] == path.name), None) if index is not None else None
        if row is not None:
            self._add([path], (row, f"{path.parent.name}: {row}", f"{path.parent}: {row}"))
        else:  # runs of one spec with other settings have its name: their folders tell them apart
            self._add([path], (self._spec(path)[1] or path.name, path.name, str(path)))

    def add_study(self, path: Path, index: Mapping[str, Any]) -> None:
        by_row: dict[str, list[Path]] = {}
        for run in index["runs"]:
            by_row.setdefault(run["row"], []).append(path / run["folder"])
        keys = {row: self._add(paths, (row, f"{path.name}: {row}", f"{path}: {row}")) for row, paths in by_row.items()}
        baselines = index["baselines"]
        for row, key in keys.items():
            self.baselines.setdefault(key, keys[baselines[row]])
        for item in index["published"]:
            against = item["against"] or baselines[item["variant"]]
            self.published.append({**item, "variant": keys[item["variant"]], "against": keys[against]})

    def names(self) -> dict[str, str]:
        """The name of each group: the shortest that tells them apart."""
        used = Counter(name for names in self._names.values() for name in dict.fromkeys(names))
        return {key: next((name for name in names if used[name] == 1), names[-1]) for key, names in self._names.items()}

    def _add(self, paths: Sequence[Path], names: tuple[str, str, str]) -> str:
        key = next(filter(None, (self._spec(path)[0] for path in paths)), names[-1])
        known = self.paths.setdefault(key, [])
        known += [path for path in paths if path not in known]
        self._names.setdefault(key, names)
        return key

    def _spec(self, path: Path) -> tuple[str, str]:
        """What identifies a run's spec but for its seed, and its name; both empty where it cannot be read."""
        try:
            spec = load(path, trust=self.trust)
        except GraphoptError:  # of a plan that was compiled by hand, of code that is not trusted, or not there yet
            return "", ""
        return identity(spec, seed=False), spec.name


def _paths(what: Sequence[str]) -> dict[Path, bool]:
    """The folders that arguments name, globs expanded, each once; and whether it was named itself."""
    found: dict[Path, bool] = {}
    for text in what:
        text = os.path.expanduser(text)
        by_name = os.path.exists(text)
        hits = [text] if by_name else sorted(glob.glob(text))
        usable = [Path(hit) for hit in hits if is_run(Path(hit)) or Path(hit, INDEX).is_file()]
        if not hits or (not usable and len(hits) == 1):
            why = "is not the folder of a run or a study" if hits else "no such folder"
            raise RunError(why, where=text, fix="Name folders that `graphopt train` or `graphopt study` wrote")
        found |= {path: by_name or found.get(path, False) for path in usable}
    if not found:
        raise RunError("no run and no study among them", where=", ".join(what), fix="Name folders that `graphopt train` or `study` wrote")
    return found


@contextmanager
def _tolerated(left_out: list[str] | None) -> Iterator[None]:
    """Notes an error about one run of many, so that the others are compared; None: raises it, as of a run that was named itself."""
    try:
        yield
    except RunError as error:
        if left_out is None:
            raise
        left_out.append(str(error))


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


def _row(name: str, runs: Sequence[Run | None], expected: int, metric: str) -> Row:
    results = [_result(run, metric) for run in runs if run is not None and run.summary is not None]
    return Row(name, tuple(sorted(results, key=lambda result: result.seed)), expected - len(results))


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
