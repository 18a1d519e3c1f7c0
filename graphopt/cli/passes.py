"""`graphopt passes`: the manuals of the installed passes."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import JsonOption
from graphopt.errors import PassError, did_you_mean

if TYPE_CHECKING:
    from graphopt.compiler.pass_base import Pass


def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One pass, to print its manual.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed passes, or print the manual of one: what it does, its options and defaults, what it preserves.

    Examples:

        graphopt passes

        graphopt passes freeze
    """
    from graphopt.cli.screen import grid, show, show_json
    from graphopt.compiler.registry import passes as registered

    known = registered()
    if name is not None and name not in known:
        raise PassError(f"no pass is called {name!r}", fix=did_you_mean(name, known) or f"There are {', '.join(sorted(known))}")
    chosen = {name: known[name]} if name else known
    if as_json:
        show_json({key: {"summary": _summary(cls), **cls.model_json_schema()} for key, cls in sorted(chosen.items())})
    elif name:
        _manual(known[name])
    else:
        table = grid("pass", "what it does", "preserves")
        for key, cls in sorted(known.items()):
            table.add_row(key, _summary(cls), ", ".join(sorted(cls.preserves)))
        show(table)
        show("graphopt passes NAME prints a pass's manual.")


def _summary(cls: type[Pass]) -> str:
    text = (_module_text(cls) or inspect.getdoc(cls) or "").strip().split("\n\n")[0].replace("\n", " ")
    return text.removeprefix(f"{cls.name}: ")


def _module_text(cls: type[Pass]) -> str:
    return inspect.cleandoc(getattr(sys.modules.get(cls.__module__), "__doc__", None) or "")


def _manual(cls: type[Pass]) -> None:
    from graphopt.cli.screen import grid, show
    from graphopt.spec.docs import option_texts, without_attributes

    for text in dict.fromkeys((_module_text(cls), without_attributes(cls.__doc__ or ""))):
        if text:
            show(f"{text}\n")
    meanings = option_texts(cls)
    table = grid("option", "default", "meaning")
    for field_name, field in cls.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        table.add_row(field.alias or field_name, default, meanings.get(field_name, ""))
    show(table)
    if cls.preserves:
        show(f"\npreserves: {', '.join(sorted(cls.preserves))}")
    if cls.claim:
        show(f"its regions are: {cls.claim}")
    if cls.conflicts_with:
        show(f"they must not also be: {', '.join(sorted(cls.conflicts_with))}")


def _default(value: Any) -> str:
    """A default value as TOML would have it."""
    from graphopt.compiler.triggers import Start

    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return '"start"' if isinstance(value, Start) else repr(value).replace("'", '"')
