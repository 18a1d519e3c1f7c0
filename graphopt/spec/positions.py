"""Where each key of a TOML text stands: `tomllib` gives no positions, so the text is read statement by statement."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]


def statements(text: str) -> Iterator[tuple[int, str]]:
    """(line from 1, text) of each header or key/value, multi-line values whole. `text` must be valid TOML."""
    start, held = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not held and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if held else number
        held += line + "\n"
        try:
            tomllib.loads(held)
        except tomllib.TOMLDecodeError:
            continue  # the value goes on
        yield start, held
        held = ""


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of every key path of a valid TOML text: `("pass", 0, "when", "epoch") -> 14`.

    A key inside an inline table or a multi-line array gets the line on which its name first stands in that value.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}  # elements so far of each array of tables
    table: KeyPath = ()
    for number, statement in statements(text):
        value = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = ()
            while value:
                key, value = next(iter(value.items()))
                table += (key,)
                if isinstance(value, list):  # [[key]]: one more element
                    counts[table] = counts.get(table, 0) + 1
                    lines.setdefault(table, number)
                    value = value[0]
                if table in counts:
                    table += (counts[table] - 1,)
            lines[table] = number
        else:
            for path in _paths(value, table):
                names = [part for part in path[len(table) :] if isinstance(part, str)]
                lines.setdefault(path, number + _offset(statement, names))
    return lines


def _paths(value: Any, prefix: KeyPath) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        path = (*prefix, key)
        yield path
        yield from _paths(inner, path)


def _offset(statement: str, names: list[str]) -> int:
    """Lines from the statement's first to the one where the last of `names` stands."""
    if len(names) < 2 or "\n" not in statement.rstrip():
        return 0
    for offset, line in enumerate(statement.splitlines()):
        if re.search(rf"(?<![\w-]){re.escape(names[-1])}['\"]?\s*[=.]", line):
            return offset
    return 0
