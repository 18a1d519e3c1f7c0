"""The command line: each command parses, calls and prints, in a file of its own; `COMMANDS` lists them.

Commands import what they use when they run, because torch takes seconds to load and `graphopt --help` does not need it.
"""

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from graphopt.cli.apply import apply
from graphopt.cli.check import check
from graphopt.cli.diff import diff
from graphopt.cli.export import export
from graphopt.cli.fit import fit
from graphopt.cli.inspect import inspect
from graphopt.cli.page import report
from graphopt.cli.passes import passes
from graphopt.cli.schema import schema
from graphopt.cli.screen import show_error
from graphopt.cli.specs import specs
from graphopt.cli.train import train
from graphopt.errors import GraphoptError

#: in the order of `graphopt --help`
COMMANDS = (inspect, check, apply, diff, fit, train, report, export, passes, specs, schema)

app = typer.Typer(
    name="graphopt",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the training graph of a vision backbone as a TOML spec says, train it, and get the ordinary model back.",
    epilog="Start with [bold]graphopt apply quickstart[/bold], then [bold]graphopt train quickstart[/bold]. "
    "A SPEC is a TOML file, a folder that apply or train wrote, or the name of an installed spec.",
)
for command in COMMANDS:
    app.command(command.__name__)(command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    """Options before the command; `main` reads --debug itself, so that it works after the command too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. The exit status is 0, 2 (the user can correct it), 1 (a failure) or 130 (Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        return _status(typer.main.get_command(app)(args=given, prog_name="graphopt"))
    except SystemExit as error:
        return _status(error.code)
    except KeyboardInterrupt:
        show_error("interrupted")
        return 130
    except GraphoptError as error:
        _trace(debug)
        show_error(str(error))
        return error.exit_code
    except OSError as error:
        _trace(debug)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else (error.strerror or str(error))
        show_error(f"{error.filename}: {what}" if error.filename else what)
        return 2
    except Exception as error:
        _trace(debug)
        what = (str(error).strip().splitlines() or [""])[0]
        again = "" if debug else " Run again with --debug for the traceback."
        show_error(f"{type(error).__name__}: {what}. This is an error in graphopt, or in a pass or backbone that it ran.{again}")
        return 1


def _status(code: object) -> int:
    return code if isinstance(code, int) else 0 if code is None else 1


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()
