"""`graphopt schema`: the spec's JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from graphopt.cli.options import as_path


def schema(
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="Write it there; default: print it.")] = None,
) -> None:
    """Print the JSON Schema of a spec with the installed passes, for editors that complete and check TOML.

    Example (then begin a spec with the line #:schema graphopt.schema.json):

        graphopt schema -o graphopt.schema.json
    """
    from graphopt.cli.screen import show, show_text
    from graphopt.files import write_atomically
    from graphopt.spec import schema as spec_schema

    text = json.dumps(spec_schema(), indent=2) + "\n"
    path = as_path(out)
    if path is None:
        show_text(text)
    else:
        write_atomically(path, text.encode())
        show(f"written: {path}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("schema")(schema)
