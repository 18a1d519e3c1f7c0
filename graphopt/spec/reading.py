"""TOML to `Spec`: files and installed specs by name, `--set` overrides, and pass tables, typed by the class that `use` names."""

import os
from collections.abc import Iterable, Mapping
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

import tomli
from pydantic import ValidationError

from graphopt.code import CodeError, located, named
from graphopt.compiler import registry
from graphopt.compiler.pass_base import Pass
from graphopt.errors import BackboneError, GraphoptError, SpecError, did_you_mean
from graphopt.models.catalog import SOURCES, default_input, having
from graphopt.spec.messages import Locate, joined, spec_errors
from graphopt.spec.model import BackboneSpec, Source, Spec, locate
from graphopt.spec.positions import KeyPath, key_lines

Lines = Mapping[KeyPath, int]

#: characters of a spec: a million of them, or a million mistakes, would take seconds to read
MOST_TEXT = 500_000
#: how deep tables and arrays may be nested
MOST_NESTED = 32
_NESTED = f"tables and arrays are nested more than {MOST_NESTED} deep"


def load(source: str | Path, *, trust: bool = False, overrides: Iterable[str] = ()) -> Spec:
    """The spec at a path, in a folder that holds a `spec.toml` (a run, an `apply`), or installed under a name.

    Raises SpecError with file, line and field.

    Args:
        trust: allow a pass in code (`use = "file.py:Class"` or `"package.module:Class"`).
        overrides: `"train.epochs=1"`, `"pass.0.when.epoch=2"`: a key path and a TOML value (or bare text).
    """
    path = _find(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError("not text in UTF-8", where=str(path)) from error
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return loads(text, file=_short(path), folder=path.parent, trust=trust, overrides=overrides)


def _find(source: str | Path) -> Path:
    """The file that a spec argument means."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        if (path / "spec.toml").is_file():
            return path / "spec.toml"
        fix = "Name a spec file, or a folder that apply or train wrote"
        if (path / "run.json").is_file():
            fix = f"Restore it: `graphopt train SPEC -o {source} --resume` with the run's spec writes it anew"
        raise SpecError("a folder without a spec.toml", where=str(source), fix=fix)
    if os.path.exists(path):
        return path
    known = installed()
    if str(source) in known:
        return known[str(source)]
    fixes = (did_you_mean(str(source).removesuffix(".toml"), known), "`graphopt specs` lists the installed ones")
    raise SpecError("no such spec file, and no installed spec of that name", where=str(source), fix=" ".join(filter(None, fixes)))


def installed() -> dict[str, Path]:
    """Installed specs by name: `quickstart`, `infopro/resnet110-k2`."""
    root = Path(str(resources.files("graphopt.specs")))
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.toml"))}
    return {name: path for name, path in found.items() if not name.startswith("studies/")}  # those are of many runs


def loads(text: str, *, file: str | None = None, folder: Path = Path(), trust: bool = False, overrides: Iterable[str] = ()) -> Spec:
    """A spec from TOML 1.1 text. Takes and raises what `load` does.

    `file` is its name in messages, `folder` where its relative paths start.
    """
    if len(text) > MOST_TEXT:
        what = f"a spec has at most {MOST_TEXT:,} characters, this one has {len(text):,}"
        raise SpecError(what, where=file or "spec", fix="Name the spec's file, not that of weights or data")
    data = parse(text, file or "spec")
    lines = key_lines(text)
    for override in overrides:
        path = _override(data, override)
        lines = {key: line for key, line in lines.items() if key[: len(path)] != path}
        lines[path] = 0  # it stands on no line; messages name --set instead
    return from_table(data, file=file, lines=lines, folder=folder, trust=trust)


def parse(text: str, file: str) -> dict[str, Any]:
    """TOML as plain values. Raises SpecError, with `file`, for what is none, is nested too deep, or has a number that is too long."""
    try:
        return _parsed(text)
    except tomli.TOMLDecodeError as error:
        why = _twice(error) or f"{error.msg[:1].lower()}{error.msg[1:]}"
        message = f"not TOML (line {error.lineno}, column {error.colno}): {why}"
        raise SpecError(message, where=f"{file}:{error.lineno}:{error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(str(error), where=file) from None


def _twice(error: tomli.TOMLDecodeError) -> str | None:
    """Which key has two values, where that is what is wrong; tomli does not name it."""
    if error.msg != "Cannot overwrite a value":
        return None
    key, equals, _ = error.doc.split("\n")[error.lineno - 1].partition("=")
    return f"{key.strip()!r} has a value already" if equals else None


def _parsed(text: str) -> dict[str, Any]:
    """TOML as plain values; raises RecursionError if they are nested too deep, ValueError for a number that is too long."""
    try:
        data = tomli.loads(text)
    except RecursionError:
        raise RecursionError(_NESTED) from None
    level: list[Any] = [data]
    for _ in range(MOST_NESTED):
        inner = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return data
    raise RecursionError(_NESTED)


def from_table(
    data: Mapping[str, Any], *, file: str | None = None, lines: Lines | None = None, folder: Path = Path(), trust: bool = False
) -> Spec:
    """A spec from plain TOML values: from what `loads` has parsed, or from `Spec.resolved()`. Raises as `load` does."""
    lines = lines or {}
    tables = data.get("pass", [])
    if not isinstance(tables, list):
        where = locate(file or "spec", lines, [], ("pass",))
        raise SpecError("expected [[pass]] tables", where=where, fix="Write [[pass]] with two brackets")
    uses = [str(item.get("use", "")) if isinstance(item, Mapping) else "" for item in tables]
    at = partial(locate, file or "spec", lines, uses)
    pass_values: list[Pass] = []
    mistakes: list[SpecError] = []
    for index, item in enumerate(tables):
        path = ("pass", index)
        try:
            cls, options = _class_and_options(item, path, at, folder, trust)
        except SpecError as error:
            mistakes.append(error)
            continue
        try:
            pass_values.append(cls.model_validate(options))
        except ValidationError as error:
            mistakes += spec_errors(error, cls, options, at, path)
        except GraphoptError as error:
            mistakes.append(SpecError(error.what, where=at(path), fix=error.fix))
    values = {**data, "pass": tuple(pass_values)}
    try:
        _complete(values, folder)
        spec = Spec.model_validate(values)
    except ValidationError as error:
        mistakes = spec_errors(error, Spec, values, at) + mistakes
    except BackboneError as error:
        raise SpecError(error.what, where=at(("backbone", "name")), fix=error.fix) from error
    if mistakes:
        raise joined(mistakes)
    spec._file, spec._lines = file, lines
    return spec


def _class_and_options(item: Any, path: KeyPath, where: Locate, folder: Path, trust: bool) -> tuple[type[Pass], dict[str, Any]]:
    """The pass class that a `[[pass]]` table names with `use`, and its other keys."""
    if not isinstance(item, Mapping):
        raise SpecError("expected a [[pass]] table", where=where(path))
    use, installed_passes = item.get("use"), registry.names()
    options = {key: value for key, value in item.items() if key != "use"}
    known = f"There are {', '.join(installed_passes)}"
    if not isinstance(use, str):
        raise SpecError("'use' is missing" if use is None else "'use' is the name of a pass", where=where(path), fix=known)
    if ":" in use:
        return _pass_in_code(use, folder, trust, where((*path, "use"))), options
    if use not in installed_passes:
        raise SpecError(f"unknown pass {use!r}", where=where((*path, "use")), fix=did_you_mean(use, installed_passes) or known)
    return registry.load(use), options


def _pass_in_code(use: str, folder: Path, trust: bool, where: str) -> type[Pass]:
    if not trust:
        raise SpecError(f"the spec names Python code ({use!r}), which would run", where=where, fix="Read it, then pass --trust")
    # A spec names a file from its own folder; a run's resolved spec names it by its full path.
    try:
        cls = named(use, [folder])
    except CodeError as error:
        raise SpecError(error.what, where=where, fix=error.fix) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        home, _, name = use.rpartition(":")
        raise SpecError(f"{home} has no pass class {name!r}", where=where)
    return _named(cls, located(use, [folder]))


@cache
def _named(cls: type[Pass], name: str) -> type[Pass]:
    """`cls` with a name that says where it is, so that a resolved spec can be loaded again."""
    return type(cls.__name__, (cls,), {"name": name, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _complete(data: dict[str, Any], folder: Path) -> None:
    """Gives files that are found from the spec's folder their full path, and the backbone its own input shape where the spec has none.

    Raises BackboneError if the source of the backbone has none of that name.
    """
    for table, key in (("backbone", "weights"), ("data", "root")):
        value = data[table].get(key) if isinstance(data.get(table), Mapping) else None
        if isinstance(value, str):
            data[table] = {**data[table], key: _located(value, folder)}
        elif isinstance(value, Mapping) and isinstance(value.get("file"), str):
            data[table] = {**data[table], key: {**value, "file": _located(value["file"], folder)}}
    train = data.get("train")
    teacher = train.get("distill") if isinstance(train, Mapping) else None
    if isinstance(train, Mapping) and isinstance(teacher, Mapping) and isinstance(teacher.get("weights"), str):
        data["train"] = {**train, "distill": {**teacher, "weights": _located(teacher["weights"], folder)}}
    backbone = data.get("backbone")
    if isinstance(backbone, Mapping):
        source, name, arguments = (backbone.get(key) for key in ("source", "name", "arguments"))
        if source == "python" and isinstance(name, str):
            backbone = data["backbone"] = {**backbone, "name": located(name, [folder])}
        shape: tuple[int, ...] | None = (1,)  # any: where source or name is wrong, a missing input is no second mistake
        if source in SOURCES and isinstance(name, str):
            shape = default_input(source, name, arguments if isinstance(arguments, Mapping) else {})
        if shape and backbone.get("input") is None:
            data["backbone"] = {**backbone, "input": shape}


def _located(file: str, folder: Path) -> str:
    """The full path of what is found from the spec's folder."""
    return str((folder / file).resolve()) if os.path.exists(folder / file) else file


def resolve(text: str, input: tuple[int, ...] | None = None) -> BackboneSpec:
    """`"timm/resnet50"` or `"python/file.py:factory"` as a `[backbone]` table; `input` is by default the model's own.

    Raises BackboneError if it is not source/name, the source has no such model, or its input is not known; SpecError for a wrong one.
    """
    source, slash, name = text.partition("/")
    if not slash or source not in SOURCES:
        known = "" if slash else " or ".join(f"{source}/{text}" for source in having(text))
        fix = f"Write source/name, the source being one of {', '.join(SOURCES)}: {known or 'timm/resnet50'}"
        raise BackboneError(f"{text!r} is not source/name", fix=(slash and did_you_mean(source, SOURCES)) or fix)
    shape = input or default_input(source, name, {})
    if shape is None:
        raise BackboneError("the input shape is not known", where=text, fix="Give it: --input 3,224,224")
    name = located(name) if source == "python" else name
    try:
        return BackboneSpec(source=cast(Source, source), name=name, input=shape)
    except ValidationError as error:
        values = {"source": source, "name": name, "input": shape}
        raise joined(spec_errors(error, BackboneSpec, values, lambda path: f"{text}, {path[0]}")) from None


def _override(data: dict[str, Any], text: str) -> KeyPath:
    """Sets one key of `data`, in place; returns its path."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError("expected key.path=value", where=f"--set {text}", fix="For example --set train.epochs=1")
    try:
        parsed = _parsed(f"value = {value}")["value"]
    except tomli.TOMLDecodeError:
        parsed = value.strip()
    except (ValueError, RecursionError) as error:
        raise SpecError(str(error), where=f"--set {key.strip()}") from None
    *parts, last = key.strip().split(".")
    table: Any = data
    path: KeyPath = ()
    try:
        for part in parts:
            if isinstance(table, list):
                path, table = (*path, int(part)), table[int(part)]
                continue
            path, holder = (*path, part), table
            table = holder.setdefault(part, [] if path == ("pass",) else {})
            if isinstance(table, str) and path in (("train", "optimizer"), ("train", "scheduler"), ("train", "loss")):
                table = holder[part] = {"name": table}  # the short form becomes a table once an option is set
        final = int(last) if isinstance(table, list) else last
        table[final] = parsed
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise SpecError(f"the spec has no key {key.strip()!r}", where=f"--set {text}") from error
    return (*path, final)


def _short(path: Path) -> str:
    """As the user would write it: relative if it is below the working directory."""
    full = path.resolve()
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else path)
