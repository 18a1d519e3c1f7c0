"""Validation errors for the user of a TOML file: line, field, what was expected and found, and the nearest key."""

import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from graphopt.errors import SpecError, did_you_mean
from graphopt.spec.positions import KeyPath

Locate: TypeAlias = Callable[[KeyPath], str]

#: mistakes of one table that are told; each is looked at for names that were meant
MOST_MISTAKES = 100
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text in quotes",
    "bool": "true or false",
    **dict.fromkeys(("tuple", "list", "set", "frozen_set"), "an array"),
    **dict.fromkeys(("dict", "model"), "a table"),
}
_BOUNDS = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}


def spec_errors(error: ValidationError, model: type[BaseModel], data: Any, locate: Locate, prefix: KeyPath = ()) -> list[SpecError]:
    """All that is wrong in `data`, which `model` has validated and which is at `prefix` in the spec: one error for each key."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_in_data(item["loc"], data, item["type"]), []).append(item)
    # Where one branch of a union accepts a table or an array and finds a mistake inside, the others' complaint about it says nothing.
    around = {path[:end] for path in grouped for end in range(len(path))}
    wrong = [path for path in grouped if path not in around]
    found = [_mistake(path, grouped[path], model, locate, prefix) for path in wrong[:MOST_MISTAKES]]
    more = len(wrong) - MOST_MISTAKES
    return [*found, SpecError(f"{more:,} more like these", where=locate(prefix))] if more > 0 else found


def joined(mistakes: list[SpecError]) -> SpecError:
    """One error for all of them."""
    if len(mistakes) == 1:
        return mistakes[0]
    return SpecError(f"{len(mistakes)} mistakes" + "".join(f"\n  {mistake}" for mistake in mistakes))


def _mistake(path: KeyPath, items: list[Any], model: type[BaseModel], locate: Locate, prefix: KeyPath) -> SpecError:
    first, key = items[0], (*prefix, *path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        fix = did_you_mean(str(path[-1]), known) or (f"Known keys: {', '.join(sorted(known))}" if known else None)
        return SpecError(f"unknown key {str(path[-1])!r}", where=locate(key), fix=fix)
    if first["type"] == "missing":
        return SpecError(f"{str(path[-1])!r} is missing", where=locate(key[:-1]))
    if len(items) == 1:
        message, fix = _message(first)
        return SpecError(message, where=locate(key), fix=fix)
    # A union: each of its branches says what it expected, unless one of them accepts this kind of value.
    expected = list(dict.fromkeys(text for item in items if (text := _expected(item))))
    accepted = (_message(item)[0] for item in items if not _expected(item))
    return SpecError(next(accepted, f"expected {' or '.join(expected)}, found {_found(first['input'])}"), where=locate(key))


def _expected(item: Any) -> str | None:
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    return _EXPECTED.get(item["type"].removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float"))


def _message(item: Any) -> tuple[str, str | None]:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if expected := _expected(item):
        word = kind == "literal_error" and isinstance(value, str)
        fix = did_you_mean(value, re.findall(r"'([^']*)'", str(context["expected"]))) if word else None
        return f"expected {expected}, found {_found(value)}", fix
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind]} {next(iter(context.values()))}, found {_found(value)}", None
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", item["msg"])), None
    if kind in ("too_short", "too_long"):
        words = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"expected {words} items, found {_found(value)}", None
    return f"{item['msg'][:1].lower()}{item['msg'][1:]}, found {_found(value)}", None


def _found(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an empty array" if not value else f"an array {list(value)!r}" if len(repr(value)) < 60 else "an array"
    return repr(value)


def _in_data(loc: Iterable[str | int], data: Any, kind: str) -> KeyPath:
    """`loc` without the parts that pydantic adds (names of union branches), as far as `data` goes."""
    path: KeyPath = ()
    parts = list(loc)
    for index, part in enumerate(parts):
        inside = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if inside or (isinstance(data, Mapping) and part in data):
            data = data[part]
        elif not (kind == "missing" and index == len(parts) - 1):
            continue
        path += (part,)
    return path


def _known_keys(model: Any, path: KeyPath) -> set[str]:
    """Keys that a table at `path` inside `model` may have, union branches together."""
    models = list(_models(model))
    for part in path:
        if isinstance(part, int):
            continue  # an array's elements have its annotation
        fields = [field for each in models for name, field in each.model_fields.items() if part in (name, field.alias)]
        models = [inner for field in fields for inner in _models(field.annotation)]
    return {field.alias or name for each in models for name, field in each.model_fields.items()}


def models_in(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The models that the fields of a model hold, at any depth."""
    found: set[type[BaseModel]] = set()
    pending = [model]
    while pending:
        inner = {m for field in pending.pop().model_fields.values() for m in _models(field.annotation)} - found
        found |= inner
        pending += inner
    return found


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
