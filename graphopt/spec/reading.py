"""TOML to `Spec`: files and installed specs by name, `--set` overrides, pass tables by the class their `use` names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from graphopt.compiler.registry import passes
from graphopt.errors import BackboneError, GraphoptError, SpecError, did_you_mean
from graphopt.models.catalog import SOURCES, default_input, unknown
from graphopt.spec.messages import spec_error
from graphopt.spec.model import BackboneSpec, Spec, locate
from graphopt.spec.positions import KeyPath, key_lines


def load(source: str | Path, *, trust: bool = False, overrides: Iterable[str] = ()) -> Spec:
    """The spec at a path, in a folder that holds a `spec.toml` (a run, an `apply`), or installed under a name.

    Args:
        trust: allow a pass that is code in a file (`use = "file.py:Class"`).
        overrides: `"train.epochs=1"`, `"pass.0.when.epoch=2"`: a key path and a TOML value (or bare text).

    Raises:
        SpecError: with file, line and field.
    """
    path = find(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError("not text in UTF-8", where=str(path)) from error
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return loads(text, file=_short(path), folder=path.parent, trust=trust, overrides=overrides)


def find(source: str | Path) -> Path:
    """The file that a spec argument means."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "spec.toml").is_file():
            return path / "spec.toml"
        fix = "Name a spec file, or a folder that apply or train wrote"
        raise SpecError("a folder without a spec.toml", where=str(source), fix=fix)
    if path.exists():
        return path
    known = installed()
    if str(source) in known:
        return known[str(source)]
    near = did_you_mean(str(source).removesuffix(".toml"), known)
    fix = f"{near} `graphopt specs` lists the installed ones" if near else "`graphopt specs` lists the installed ones"
    raise SpecError("no such spec file, and no installed spec of that name", where=str(source), fix=fix)


def installed() -> dict[str, Path]:
    """Installed specs by name: `quickstart`, `infopro/resnet110-k2`."""
    root = Path(str(resources.files("graphopt.specs")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.toml"))}


def loads(
    text: str,
    *,
    file: str | None = None,
    folder: Path | None = None,
    trust: bool = False,
    overrides: Iterable[str] = (),
) -> Spec:
    """A spec from TOML text; `file` is for messages, `folder` is where its relative paths start."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax(error, text, file) from error
    lines = dict(key_lines(text))
    for override in overrides:
        path = _override(data, override)
        for known in [known for known in lines if known[: len(path)] == path]:
            del lines[known]
        lines[path] = 0  # it stands on no line; messages say --set
    return from_table(data, file=file, lines=lines, folder=folder, trust=trust)


def from_table(
    data: Mapping[str, Any],
    *,
    file: str | None = None,
    lines: Mapping[KeyPath, int] | None = None,
    folder: Path | None = None,
    trust: bool = False,
) -> Spec:
    """A spec from plain TOML values, as `loads` does after parsing and `Spec.resolved` gives back."""
    lines, folder = lines or {}, folder or Path()
    raw = data.get("pass", [])
    items = raw if isinstance(raw, list) else []
    uses = [str(item.get("use", "")) if isinstance(item, Mapping) else "" for item in items]

    def where(path: KeyPath) -> str | None:
        return locate(file or "spec", lines, path, uses)

    passes: list[BaseModel] = []
    failed: list[SpecError] = []
    if not isinstance(raw, list):
        raise SpecError("expected [[pass]] tables", where=where(("pass",)), fix="Write [[pass]] with two brackets")
    for index, item in enumerate(raw):
        try:
            passes.append(_pass(item, ("pass", index), where, folder, trust))
        except SpecError as error:
            failed.append(error)
    rest = {**{key: value for key, value in data.items() if key != "pass"}, "pass": tuple(passes)}
    rest = _paths_from(rest, folder)
    try:
        rest = _with_input(rest)
        spec = Spec.model_validate(rest)
    except ValidationError as error:
        failed.insert(0, spec_error(error, Spec, rest, where))
    except GraphoptError as error:
        raise SpecError(error.what, where=where(("backbone", "name")), fix=error.fix) from error
    if len(failed) == 1:
        raise failed[0]
    if failed:
        lines_ = [line.strip() for error in failed for line in str(error).splitlines()]
        told = [line for line in lines_ if not re.fullmatch(r"\d+ mistakes", line)]
        raise SpecError(f"{len(told)} mistakes" + "".join(f"\n  {line}" for line in told))
    spec._file, spec._lines = file, lines
    return spec


def _pass(item: Any, path: KeyPath, where: Any, folder: Path, trust: bool) -> BaseModel:
    if not isinstance(item, Mapping):
        raise SpecError("expected a [[pass]] table", where=where(path))
    use = item.get("use")
    if not isinstance(use, str):
        what = "'use' is missing" if use is None else "'use' is the name of a pass"
        raise SpecError(what, where=where(path), fix=f"There are {', '.join(sorted(installed_passes()))}")
    if ":" in use:
        cls = _pass_from_file(use, folder, trust, where((*path, "use")))
    else:
        known_passes = installed_passes()
        if use not in known_passes:
            fix = did_you_mean(use, known_passes) or f"There are {', '.join(sorted(known_passes))}"
            raise SpecError(f"unknown pass {use!r}", where=where((*path, "use")), fix=fix)
        cls = known_passes[use]
    options = {key: value for key, value in item.items() if key != "use"}
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        raise spec_error(error, cls, options, lambda inner: where((*path, *inner))) from error
    except GraphoptError as error:
        raise SpecError(error.what, where=where(path), fix=error.fix) from error


def installed_passes() -> Mapping[str, Any]:
    """Pass classes by their name in specs, as the registry knows them (entry points)."""
    return passes()


def _pass_from_file(use: str, folder: Path, trust: bool, where: str | None) -> Any:
    file, _, name = use.rpartition(":")
    if not trust:
        what = f"the spec names Python code ({use!r}), which would run"
        raise SpecError(what, where=where, fix="Read it, then pass --trust")
    # As written in the spec beside it, or as a run's resolved spec keeps it: from the working directory.
    path = next((path for path in (folder / file, Path(file)) if path.is_file()), None)
    if path is None:
        raise SpecError(f"no file {file!r}", where=where)
    cls = getattr(_module(path.resolve()), name, None)
    if not (isinstance(cls, type) and issubclass(cls, BaseModel)):
        raise SpecError(f"{file} has no pass class {name!r}", where=where)
    return _referred(cls, f"{path.resolve()}:{name}")


@cache
def _module(path: Path) -> Any:
    name = f"graphopt_pass_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SpecError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where pydantic looks up annotations that are text (`from __future__ import annotations`)
    try:
        found.loader.exec_module(module)
    except GraphoptError:
        raise
    except Exception as error:
        raise SpecError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module


@cache
def _referred(cls: type[BaseModel], use: str) -> type[BaseModel]:
    """`cls` under the reference that finds it again, so that a resolved spec can be loaded."""
    return type(cls.__name__, (cls,), {"name": use, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _paths_from(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Files that stand beside the spec are named from there; others are left to the working directory."""
    for table, key in (("backbone", "weights"), ("data", "root")):
        value = data[table].get(key) if isinstance(data.get(table), Mapping) else None
        if isinstance(value, str) and (folder / value).exists():
            data[table] = {**data[table], key: str((folder / value).resolve())}
    return data


def _with_input(data: dict[str, Any]) -> dict[str, Any]:
    """Without `input` in `[backbone]`: the size that the library gives for this model.

    Raises:
        BackboneError: the library has no such model.
    """
    table = data.get("backbone")
    if not isinstance(table, Mapping) or table.get("input") is not None:
        return data
    source, name, arguments = table.get("source"), table.get("name"), table.get("arguments")
    if not isinstance(source, str) or source not in SOURCES or not isinstance(name, str):
        return {**data, "backbone": {**table, "input": (1,)}}  # the field that is wrong has an error of its own
    shape = default_input(source, name, arguments if isinstance(arguments, Mapping) else {})
    if shape is None and source != "python":
        raise unknown(source, name)
    return {**data, "backbone": {**table, "input": shape}} if shape else data


def resolve(text: str, *, arguments: Mapping[str, Any] | None = None, input: tuple[int, ...] | None = None) -> BackboneSpec:
    """`"timm/resnet50"` or `"python/package.module:factory"` as a `[backbone]` table; the input is the model's own unless given.

    Raises:
        BackboneError: it is not source/name, the source has no such model, or its input is not known.
    """
    source, slash, name = text.partition("/")
    if not slash or source not in SOURCES:
        guess = did_you_mean(source, SOURCES) if slash else None
        fix = guess or f"Write source/name, the source being one of {', '.join(SOURCES)}: timm/resnet50"
        raise BackboneError(f"{text!r} is not source/name", fix=fix)
    shape = input or default_input(source, name, arguments or {})
    if shape is None:
        if source == "python":
            raise BackboneError("the input shape is not known", where=text, fix="Give it: --input 3,224,224")
        raise unknown(source, name)
    return BackboneSpec(source=cast(Any, source), name=name, arguments=dict(arguments or {}), input=shape)


def _override(data: dict[str, Any], text: str) -> KeyPath:
    """Set one key of `data`, in place; returns its path."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError("expected key.path=value", where=f"--set {text}", fix="For example --set train.epochs=1")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    parts = key.strip().split(".")
    at: Any = data
    path: KeyPath = ()
    try:
        for part in parts[:-1]:
            if isinstance(at, list):
                at, path = at[int(part)], (*path, int(part))
            else:
                at, path = at.setdefault(part, [] if (*path, part) == ("pass",) else {}), (*path, part)
            if isinstance(at, str) and path in (("train", "optimizer"), ("train", "scheduler")):
                data["train"][path[-1]] = at = {"name": at}  # the short form takes options once one is set
        last: str | int = int(parts[-1]) if isinstance(at, list) else parts[-1]
        at[last] = parsed
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise SpecError(f"the spec has no place for {key.strip()!r}", where=f"--set {text}") from error
    return (*path, last)


def _syntax(error: tomllib.TOMLDecodeError, text: str, file: str | None) -> SpecError:
    message = str(error)
    found = re.search(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)", message)
    what = message[: found.start()] if found else message
    lines = text.splitlines() or [""]
    line, column = (int(found[1]), int(found[2])) if found and found[1] else (len(lines), len(lines[-1]) + 1)
    place = f"{file or 'spec'}:{line}:{column}"
    return SpecError(f"not TOML (line {line}, column {column}): {what[:1].lower()}{what[1:]}", where=place)


def _short(path: Path) -> str:
    """As the user would write it: relative where it lies below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
