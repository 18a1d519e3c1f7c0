"""All output of the command line. No control character of a name or a message reaches the terminal."""

import json
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from graphopt.errors import printable

#: columns of output that is no terminal (a pipe, a log): enough for tables not to break words
_PLAIN_WIDTH = 140


class _Screen(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn at last, whoever made it; the console's own control sequences are segments of another kind."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console() -> Console:
    """A console on the current standard output, which tests and pipes exchange."""
    out = _Screen(highlight=False)
    return out if out.is_terminal else _Screen(highlight=False, width=_PLAIN_WIDTH)


def show_error(message: str, kind: str = "error") -> None:
    """One message on standard error, never wrapped, so that paths stay whole."""
    out = _Screen(stderr=True, highlight=False)
    out.print(Text.assemble((f"{kind}: ", "bold red"), printable(message)), soft_wrap=True)


def show_warnings() -> None:
    """From now on, warnings of libraries are one line each."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        show_error(str(message), "warning")

    warnings.showwarning = show


def show(what: Any = "") -> None:
    """Prints text or a rich object."""
    console().print(what, markup=False, soft_wrap=isinstance(what, str))


def show_json(value: Any) -> None:
    """Prints JSON, for programs."""
    show_text(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show_text(text: str) -> None:
    """Prints a text line by line as it is (a TOML file, say), but for control characters, which JSON and TOML write as escapes anyway."""
    sys.stdout.write(printable(text if text.endswith("\n") else text + "\n"))
    sys.stdout.flush()


def grid(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """An empty table in the common style; `right` are the numbers of the columns that hold figures."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right)
    return table
