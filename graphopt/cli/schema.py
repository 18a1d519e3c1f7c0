"""`graphopt schema`: the spec's JSON Schema."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import expanded


def schema(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", parser=expanded, help="Write it there; default: print it.")
    ] = None,
) -> None:
    """Print the JSON Schema of a spec with the installed passes, for editors that complete and check TOML.

    Example (then begin a spec with the line #:schema graphopt.schema.json):

        graphopt schema -o graphopt.schema.json
    """
    from graphopt.cli.screen import show, show_text
    from graphopt.files import write_atomically
    from graphopt.spec import schema as spec_schema

    text = json.dumps(spec_schema(), indent=2) + "\n"
    if out is None:
        show_text(text)
    else:
        write_atomically(out, text.encode())
        show(f"written: {out}")
