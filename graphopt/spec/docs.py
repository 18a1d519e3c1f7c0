"""Texts about the options of a pass, from the `Attributes:` section of its docstring; for manuals and JSON Schema."""

import inspect
import re

from pydantic import BaseModel

_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


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
