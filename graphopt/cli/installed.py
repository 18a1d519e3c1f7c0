"""What is installed: `graphopt passes` (and their manuals), `specs`, and `schema`, the JSON Schema of a spec."""

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import JsonOption, complete_pass, complete_spec, out_option
from graphopt.cli.screen import grid, show, show_json, show_prose, show_text
from graphopt.errors import PassError, SpecError, did_you_mean
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.compiler.pass_base import Pass


def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One pass, to print its manual.", autocompletion=complete_pass)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed passes, or print the manual of one: what it does, its options and defaults, what it preserves.

    Examples:

        graphopt passes

        graphopt passes freeze
    """
    from graphopt.compiler import registry

    known = registry.names()
    if name is not None and name not in known:
        raise PassError(f"no pass is called {name!r}", fix=did_you_mean(name, known) or f"There are {', '.join(known)}")
    chosen = {key: registry.load(key) for key in ([name] if name else known)}
    if as_json:
        show_json({key: {"summary": _summary(cls), **cls.model_json_schema()} for key, cls in chosen.items()})
    elif name:
        _manual(chosen[name])
    else:
        table = grid("pass", "what it does", "preserves")
        for key, cls in chosen.items():
            table.add_row(key, _summary(cls), ", ".join(sorted(cls.preserves)))
        show(table)
        show("graphopt passes NAME prints a pass's manual.")


def _summary(cls: "type[Pass]") -> str:
    text = (_module_text(cls) or inspect.getdoc(cls) or "").strip().split("\n\n")[0].replace("\n", " ")
    return text.removeprefix(f"{cls.name}: ")


def _module_text(cls: "type[Pass]") -> str:
    return inspect.cleandoc(getattr(sys.modules.get(cls.__module__), "__doc__", None) or "")


def _manual(cls: "type[Pass]") -> None:
    from graphopt.spec.writing import kind_of, option_texts, toml_value, without_attributes

    for text in dict.fromkeys((_module_text(cls), without_attributes(cls.__doc__ or ""))):
        if text:
            show_prose(text)
    meanings = option_texts(cls)
    table = grid("option", "default", "meaning")
    for name, field in cls.model_fields.items():
        value = "" if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else '"start"' if name == "when" else "" if value is None else toml_value(value)
        table.add_row(field.alias or name, default, meanings.get(name) or kind_of(cls, name))
    show(table)
    if cls.preserves:
        show(f"\npreserves: {', '.join(sorted(cls.preserves))}")
    if cls.claim:
        show(f"its regions are: {cls.claim}")
    if cls.conflicts_with:
        show(f"they must not also be: {', '.join(sorted(cls.conflicts_with))}")


def specs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One spec, to print its TOML.", autocompletion=complete_spec)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed specs and studies, or print one as a start for your own.

    Examples:

        graphopt specs

        graphopt specs quickstart > my.toml
    """
    import tomli

    from graphopt.spec import installed
    from graphopt.studies.study import installed as installed_studies

    known = installed() | installed_studies()
    if name is not None:
        if name not in known:
            raise SpecError(f"no installed spec is called {name!r}", fix=did_you_mean(name, known))
        show_text(known[name].read_text(encoding="utf-8"))
        return
    rows: dict[str, dict[str, Any]] = {}
    for key, path in known.items():
        spec = tomli.loads(path.read_text(encoding="utf-8"))
        backbone = "{source}/{name}".format(**spec["backbone"]) if "backbone" in spec else f"study of {spec['spec']}"
        passes = [item["use"] for item in spec.get("pass", [])]
        rows[key] = {"name": spec.get("name", ""), "backbone": backbone, "passes": passes, "file": str(path)}
    if as_json:
        show_json(rows)
        return
    table = grid("spec", "backbone", "passes", "what it is")
    for key, row in rows.items():
        table.add_row(key, row["backbone"], ", ".join(row["passes"]), row["name"])
    show(table)


def schema(out: Annotated[Path | None, out_option("Write it there; default: print it.")] = None) -> None:
    """Print the JSON Schema of a spec with the installed passes, for editors that complete and check TOML.

    Example (then begin a spec with the line #:schema graphopt.schema.json):

        graphopt schema -o graphopt.schema.json
    """
    from graphopt.spec import schema as spec_schema

    text = json.dumps(spec_schema(), indent=2) + "\n"
    if out is None:
        show_text(text)
    else:
        write_atomically(out, text)
        show(f"written: {out}")
