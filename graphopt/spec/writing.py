"""A spec back to TOML, its JSON Schema for editors, and the texts about options (from the `Attributes:` section of a pass's docstring).

It has a TOML writer of its own because a resolved spec is meant to be read: one key a line, `[[pass]]` headers, small tables inline.
TOML libraries put each small table under a header, or all passes into one array.
"""

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from graphopt.compiler.registry import passes
from graphopt.spec.messages import models_in
from graphopt.spec.model import Spec

_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(spec: Spec, *, defaults: bool = True) -> str:
    """The spec as TOML, with every default or only with what was given; `loads(dumps(spec)) == spec`."""
    return dumps_table(spec.resolved(defaults=defaults))


def dumps_table(table: Mapping[str, Any]) -> str:
    """A table of plain TOML values as it would be a spec."""
    chunks = [_lines({key: value for key, value in table.items() if not _nested(value)})]
    chunks += [text for key, value in table.items() if _nested(value) for text in _section(key, value)]
    return "\n".join(chunk for chunk in chunks if chunk)


def dumps_pass(table: Mapping[str, Any]) -> str:
    """One pass's table (`Pass.table()`) as the `[[pass]]` block it would be in a spec."""
    return f"[[pass]]\n{_lines(table)}"


def toml_value(value: Any) -> str:
    """A value of a field as a spec has it: `"start"`, `[0.5, 0.5]`, `{ reconstruct = [1.0, 1.0] }`."""
    return _inline(value.model_dump(mode="json", exclude_none=True) if isinstance(value, BaseModel) else value)


def kind_of(cls: type[BaseModel], option: str) -> str:
    """What an option takes, in words: `"text or an array"`; for one that its pass does not describe."""
    words = {"number": "a number", "integer": "a whole number", "string": "text", "boolean": "true or false", "array": "an array"}
    schema = cls.model_json_schema(by_alias=False)["properties"][option]
    branches = [branch.get("type") for branch in schema.get("anyOf", [schema])]
    return " or ".join(dict.fromkeys(words.get(str(kind), "a table") for kind in branches if kind != "null"))


def _nested(value: Any) -> bool:
    tables = isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    return tables or isinstance(value, Mapping)


def _section(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"[[{_key(key)}]]\n{_lines(table)}" for table in value]
    # A long table ([train.optimizer]) reads better under a header of its own than on one line.
    long = {inner: table for inner, table in value.items() if isinstance(table, Mapping) and len(table) > 3}
    chunks = [f"[{_key(key)}]\n{_lines({k: v for k, v in value.items() if k not in long})}"]
    return chunks + [f"[{_key(key)}.{_key(inner)}]\n{_lines(table)}" for inner, table in long.items()]


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_inline(value)}\n" for key, value in table.items())


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON and TOML escape alike, except for DEL, which JSON does not escape.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inline(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return repr(value).lower()  # true, 1, 0.5, 1e-05, inf, nan
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(item) for item in value)}]"
    raise TypeError(f"a spec holds TOML values only, not {type(value).__name__}")


def schema() -> dict[str, Any]:
    """JSON Schema of a spec with the installed passes, for editors (`#:schema graphopt.schema.json`)."""
    whole = Spec.model_json_schema(by_alias=True)
    shared = whole.setdefault("$defs", {})
    branches = []
    for use, cls in sorted(passes().items()):
        table = cls.model_json_schema(by_alias=True)
        # The schema of the trigger's type lacks its short forms: the word, and a list of steps.
        when = table["properties"]["when"]
        short = [{"const": "start"}, {"type": "array", "items": {"type": "object"}}]
        table["properties"]["when"] = {"anyOf": [*short, *when.get("oneOf", when.get("anyOf", []))], "default": "start"}
        shared.update(table.pop("$defs", {}))
        for model in (cls, *models_in(cls), *models_in(Spec)):
            described = table if model is cls else shared.get(model.__name__, {})
            for name, text in option_texts(model).items():
                described.get("properties", {}).get(name, {}).setdefault("description", text)
        table["properties"] = {"use": {"const": use, "type": "string"}, **table["properties"]}
        table["required"] = ["use", *table.get("required", [])]
        branches.append(table)
    use_file = {"use": {"type": "string", "pattern": ":"}}
    by_file = {"title": "a pass by file (--trust)", "properties": use_file, "required": ["use"]}
    whole["properties"]["pass"]["items"] = {"anyOf": [*branches, by_file]}
    # `input` may be left out: the default is the model's own.
    shared["BackboneSpec"]["required"] = ["source", "name"]
    for field in ("optimizer", "scheduler", "loss"):
        either = [{"type": "string"}, {"$ref": f"#/$defs/{field.title()}Spec"}]
        shared["TrainSpec"]["properties"][field] = {"anyOf": either, "description": f"its name, or [train.{field}]"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "graphopt spec"}


def option_texts(cls: type[BaseModel]) -> dict[str, str]:
    """The meaning of each option, by name: its field's description, or its entry under `Attributes:` (of the class or a base class)."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= _attributes(base.__doc__ or "")
    described = {name: field.description for name, field in cls.model_fields.items() if field.description}
    return {name: text for name, text in {**texts, **described}.items() if name in cls.model_fields}


def without_attributes(text: str) -> str:
    """A docstring without its `Attributes:` section."""
    return re.sub(r"^Attributes:\n(?:(?:    .*)?\n)*", "", inspect.cleandoc(text) + "\n", flags=re.MULTILINE).strip()


def _attributes(text: str) -> dict[str, str]:
    found = re.search(r"^Attributes:\n((?:(?:    .*)?\n)*)", inspect.cleandoc(text) + "\n", flags=re.MULTILINE)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (found[1] if found else "").splitlines():
        body = line.removeprefix("    ")
        # Two on a line ("first, last: ...") share the text; deeper lines continue it.
        entry = None if body.startswith(" ") else _ENTRY.match(body)
        if entry:
            names = entry[1].split(", ")
            texts |= dict.fromkeys(names, entry[2])
        elif body.strip():
            texts |= {name: f"{texts[name]} {body.strip()}" for name in names}
    return texts
