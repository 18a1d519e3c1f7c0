"""The command line: each command parses, calls and prints; `COMMANDS` lists them.

Commands import what they use when they run, because torch takes seconds to load and `graphopt --help` does not need it.
"""

import gc
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from graphopt.cli.apply import apply
from graphopt.cli.check import check
from graphopt.cli.diff import diff
from graphopt.cli.evaluate import eval
from graphopt.cli.fit import fit
from graphopt.cli.importing import import_
from graphopt.cli.inspect import inspect
from graphopt.cli.installed import passes, schema, specs
from graphopt.cli.runs import export, report, train
from graphopt.cli.screen import show_error, show_warnings
from graphopt.cli.studies import compare, study
from graphopt.errors import GraphoptError, printable
from graphopt.files import reason

#: in the order of `graphopt --help`
COMMANDS = (inspect, check, apply, diff, fit, train, eval, report, export, study, compare, import_, passes, specs, schema)

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
#: how many new objects wait for the cyclic collector, instead of Python's 700. Compiling makes millions that live long, which it would
#: go through again and again; a training step leaves next to no cycles behind, so that nothing piles up in a long run
_COLLECT_AFTER = 20_000

for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    """Options before the command; `main` reads --debug itself, so that it works after the command too."""


def _command() -> Any:
    """The commands as typer makes them; a flag is shown without the type `<bool>`, as if it took a value."""
    made: Any = typer.main.get_command(app)
    for command in (made, *made.commands.values()):
        for parameter in command.get_params(typer.Context(command, **made.context_settings)):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. The exit status is 0, 2 (the user can correct it), 1 (a failure) or 130 (Ctrl-C)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    show_warnings()
    gc.set_threshold(_COLLECT_AFTER)
    try:
        _command()(args=[argument for argument in given if argument != "--debug"], prog_name="graphopt")
        return 0
    except SystemExit as exit:
        if exit.code == 130:  # what typer makes of a Ctrl-C that nobody waited for
            show_error("interrupted")
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception as error:
        if debug:
            sys.stderr.write(printable(traceback.format_exc()))
        if isinstance(error, GraphoptError):
            if not error.silent:
                show_error(str(error))
            return error.exit_code
        # Of several processes, the one that reports an error has noted its number.
        rank = "".join(f"{note}: " for note in getattr(error, "__notes__", ()) if note.startswith("rank "))
        if isinstance(error, OSError):
            show_error(f"{rank}{error.filename}: {reason(error)}" if error.filename else f"{rank}{reason(error)}")
            return 2
        what = (str(error).strip().splitlines() or [""])[0]
        again = "" if debug else " Run again with --debug for the traceback."
        show_error(f"{rank}{type(error).__name__}: {what}. This is an error in graphopt, or in a pass or backbone that it ran.{again}")
        return 1
