"""The one place of the command line that prints."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: columns where nobody says (a pipe, a log): wide enough that a table keeps its words whole
_PLAIN_WIDTH = 140


def console() -> Console:
    """Standard output, made anew so that it is the one in place now (tests and pipes exchange it)."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def show_error(message: str) -> None:
    """One message on standard error, never wrapped: paths in it stay whole."""
    out = Console(stderr=True, highlight=False)
    out.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def show(what: Any = "") -> None:
    """Text or a rich object."""
    console().print(what, markup=False, soft_wrap=isinstance(what, str))


def show_json(value: Any) -> None:
    """JSON, as is: for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def show_text(text: str) -> None:
    """Text exactly as it is (a TOML file, say)."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def grid(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """An empty table in the house's manner; `right` are the numbers of columns with figures."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right)
    return table
