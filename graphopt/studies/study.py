"""A study: a TOML file that names a base spec, what to vary, and seeds; and the runs that follow from it."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from graphopt.errors import GraphoptError, SpecError, did_you_mean
from graphopt.files import read_text, reason
from graphopt.spec import Spec, load
from graphopt.spec.messages import joined, spec_errors
from graphopt.spec.model import locate
from graphopt.spec.positions import key_lines
from graphopt.spec.reading import parse
from graphopt.spec.writing import toml_value

#: more are a mistake in the grid
MOST_RUNS = 10_000
#: keys of a spec that do not change what a run computes: a run that differs in them only is not repeated
FREE = {
    "train": ("device", "timeout", "checkpoint_steps", "checkpoint_format", "checkpoint_async", "keep", "log_every", "ledger"),
    "data": ("root", "workers", "cache"),
}

_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_names = BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value)
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Figure: TypeAlias = Literal["accuracy", "error", "points", "memory", "parameters", "forward FLOPs", "FLOPs", "time"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Variant(_Table):
    """`[[variant]]`: one row of the comparison."""

    name: str = Field(min_length=1, description="its name in tables")
    spec: str | None = Field(default=None, description="another base spec than the study's")
    set: dict[str, Any] = Field(default={}, description="keys of the spec and their values; tables merge, everything else replaces")
    baseline: str | None = Field(
        default=None, description="the row that it is compared with; default: the study's baseline; none for the baseline of another row"
    )


class Published(_Table):
    """`[[published]]`: a figure that somebody has published, shown beside ours."""

    variant: Annotated[tuple[str, ...], _names] = Field(min_length=1, description="the row that it belongs to, or several")
    figure: Figure = Field(description="accuracy and error in %; the others against the baseline's")
    against: str | None = Field(default=None, description="the row that the figure is a change against; default: the row's baseline")
    value: str = Field(description='as it was published: "93.26 %", "-42.8 %"')
    source: str = Field(description="where")


class Study(_Table):
    """A study's file."""

    name: str = Field(default="", description="human-readable; the comparison's title")
    spec: str | None = Field(default=None, description="the base: a file (found from the study's folder) or an installed spec")
    seeds: Annotated[tuple[Seed, ...], _tuple, Field(min_length=1)] = Field(default=(0,), description="train.seed of the runs")
    baseline: str | None = Field(
        default=None,
        description="the row that the others are compared with, or a variant: its row of the same grid values; default: the first",
    )
    set: dict[str, Any] = Field(default={}, description="keys of the spec and their values, for all runs")
    grid: dict[str, Any] = Field(default={}, description="keys of the spec and arrays of values: every combination is a row")
    variants: Annotated[tuple[Variant, ...], _tuple] = Field(default=(), alias="variant", description="rows that differ in several keys")
    published: Annotated[tuple[Published, ...], _tuple] = Field(default=(), description="published figures beside ours")


@dataclass(frozen=True)
class Member:
    """One run of a study: its row, its seed, its spec, what was set for its row, and the row that its row is compared with."""

    row: str
    seed: int
    spec: Spec
    changes: Mapping[str, Any]
    baseline: str | None = None  # None: the first
    source: str = ""  # the spec before anything was set in it

    @cached_property
    def identity(self) -> str:
        """16 hex digits that change with everything that changes what the run computes."""
        return identity(self.spec)

    @property
    def folder(self) -> str:
        """Name of the run's folder: readable, and unique by its last part."""
        return f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', self.row).strip('-.')[:60] or 'run'}-seed{self.seed}-{self.identity[:8]}"


def identity(spec: Spec, *, seed: bool = True) -> str:
    """16 hex digits of all that determines a run's result; without `seed`, the same for all seeds."""
    table = spec.resolved()
    table.pop("name", None)
    table.pop("verify", None)
    for name, keys in FREE.items():
        table[name] = {key: value for key, value in table[name].items() if key not in keys and (seed or key != "seed")}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def installed() -> dict[str, Path]:
    """Installed studies by name: `studies/share-digits`."""
    root = Path(str(resources.files("graphopt.specs")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted((root / "studies").glob("*.toml"))}


def read_study(source: str) -> tuple[Study, Path]:
    """The study at a path, or installed under a name, and its file. Raises SpecError with file, line and field."""
    path, known = Path(source).expanduser(), installed()
    if not path.is_file():
        found = known.get(source) or known.get(f"studies/{source}")
        if found is None:
            fixes = (did_you_mean(source, known), "`graphopt specs` lists the installed ones")
            raise SpecError("no such study file, and no installed study of that name", where=source, fix=" ".join(filter(None, fixes)))
        path = found
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot be read: {reason(error)}", where=str(path)) from error
    data = parse(text, str(path))
    at = partial(locate, str(path), key_lines(text), [])
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise joined(spec_errors(error, Study, data, at)) from None
    names = [variant.name for variant in study.variants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SpecError(f"two variants are called {twice!r}", where=at(("variant",)), fix="Give each a name of its own")
    if study.spec is None and not (names and all(variant.spec for variant in study.variants)):
        raise SpecError("'spec' is missing", where=str(path), fix="Name the base spec, here or in each [[variant]]")
    return study, path


def members(study: Study, path: Path, *, overrides: Sequence[str] = (), trust: bool = False) -> list[Member]:
    """Every run of a study, row by row.

    Raises SpecError for a spec that is not valid, with the row's name, for a row that the study names but does not have, and for two
    rows with the same runs.
    """
    found: list[Member] = []
    rows = list(_rows(study, path))
    baselines = {baseline for *_, baseline in rows}
    for row, source, changes, other in rows:
        baseline = row if other is None and row in baselines else other
        if "train.seed" in {*changes, *(text.partition("=")[0].strip() for text in overrides)}:
            raise SpecError("train.seed is of each run of a study", where=f"{path}, {row}", fix="Name the study's: seeds = [0, 1]")
        for seed in study.seeds:
            texts = [f"{key}={toml_value(value)}" for key, value in {**changes, "train.seed": seed}.items()]
            try:
                spec = load(source, trust=trust, overrides=[*texts, *overrides])
            except GraphoptError as error:
                raise error.with_location(f"{path}, {row}") from error.__cause__
            found.append(Member(row, seed, spec, changes, baseline, source))
            if len(found) > MOST_RUNS:
                raise SpecError(f"more than {MOST_RUNS:,} runs", where=str(path), fix="Make the grid smaller")
    _check(study, path, found)
    return found


def _check(study: Study, path: Path, found: Sequence[Member]) -> None:
    rows = list(dict.fromkeys(member.row for member in found))
    named = {("baseline", member.baseline) for member in found}
    named |= {("published", name) for item in study.published for name in (*item.variant, item.against)}
    for key, name in sorted(named, key=str):
        if name is not None and name not in rows:
            fix = did_you_mean(name, rows) or f"There are {', '.join(rows)}"
            raise SpecError(f"there is no row {name!r}", where=f"{path}, {key}", fix=fix)
    seen: dict[str, Member] = {}
    for member in found:
        other = seen.setdefault(member.identity, member)
        if other is not member:
            what = f"{other.row!r} and {member.row!r} are the same run (seed {member.seed})"
            raise SpecError(what, where=str(path), fix="Leave one of them out")


def _rows(study: Study, path: Path) -> Iterator[tuple[str, str, dict[str, Any], str | None]]:
    """The name of each row, its base spec, what is set in it, and the row that it is compared with."""
    grid = dict(_leaves(study.grid))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SpecError("expected an array of values", where=f"{path}, grid.{key}", fix=f'For example "{key}" = [0.1, 0.05]')
    common = dict(_leaves(study.set))
    lasts = [key.rpartition(".")[2] for key in grid]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(grid, lasts, strict=True)}
    names = {variant.name for variant in study.variants}
    for variant in study.variants or (Variant(name=study.name or path.stem),):
        source = _base(variant.spec or study.spec or "", path)
        baseline = variant.baseline or study.baseline
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            words = [f"{short[key]}={toml_value(value)}" for key, value in point.items()]
            name = ", ".join([*([variant.name] if study.variants or not words else []), *words])
            other = ", ".join([baseline, *words]) if baseline in names else baseline
            yield name, source, {**common, **dict(_leaves(variant.set)), **point}, other


def _base(spec: str, path: Path) -> str:
    beside = path.parent / spec
    return str(beside) if beside.exists() else spec


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The keys of nested tables as dotted paths, and their values."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
