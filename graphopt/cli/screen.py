"""All output of the command line. No control character of a name or a message reaches the terminal."""

import json
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
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


def show_prose(text: str) -> None:
    """Prints paragraphs and lists that fill the screen's width, whatever the width of the lines of `text`; indented blocks as they are."""
    width = console().width
    for paragraph in text.strip("\n").split("\n\n"):
        if paragraph.startswith((" ", "|")):
            show(paragraph)
        else:
            for item in re.split(r"\n(?=- )", paragraph):
                indent = "  " if item.startswith("- ") else ""
                filled = textwrap.wrap(
                    " ".join(item.split()), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
                )
                show("\n".join(filled))
        show()


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


#: space between columns of a table
_GAP = 2


def show_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table of names and figures; where the screen is too narrow, in several with the names in each. Figures are never cut."""
    wide = [max(len(titles[n]), *(len(row[n]) for row in rows)) for n in range(len(titles))]
    screen = console()
    names = min(wide[0], max(screen.width // 3, screen.width - sum(wide[1:]) - _GAP * (len(wide) - 1)))
    parts: list[list[int]] = [[]]
    for n in range(1, len(titles)):
        used = names + sum(_GAP + wide[column] for column in parts[-1])
        if parts[-1] and used + _GAP + wide[n] > screen.width:
            parts.append([])
        parts[-1].append(n)
    for columns in parts:
        table = grid(titles[0], *(titles[n] for n in columns), right=tuple(range(1, len(columns) + 1)))
        table.columns[0].width = names
        for row in rows:
            table.add_row(row[0], *(row[n] for n in columns))
        screen.print(table, markup=False)
