"""All output of the command line."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: columns of output that is no terminal (a pipe, a log): enough for tables not to break words
_PLAIN_WIDTH = 140


def console() -> Console:
    """A console on the current standard output, which tests and pipes exchange."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def show_error(message: str) -> None:
    """One message on standard error, never wrapped, so that paths stay whole."""
    out = Console(stderr=True, highlight=False)
    out.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def show(what: Any = "") -> None:
    """Prints text or a rich object."""
    console().print(what, markup=False, soft_wrap=isinstance(what, str))


def show_json(value: Any) -> None:
    """Prints JSON, for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def show_text(text: str) -> None:
    """Prints text exactly as it is (a TOML file, say)."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def grid(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """An empty table in the common style; `right` are the numbers of the columns that hold figures."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right)
    return table
