"""`graphopt specs`: the installed specs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.options import JsonOption
from graphopt.errors import SpecError, did_you_mean


def specs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One spec, to print its TOML.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed specs, or print one as a start for your own.

    Examples:

        graphopt specs

        graphopt specs quickstart > my.toml
    """
    from graphopt.cli.screen import grid, show, show_json, show_text
    from graphopt.spec import installed

    known = installed()
    if name is not None:
        if name not in known:
            raise SpecError(f"no installed spec is called {name!r}", fix=did_you_mean(name, known))
        show_text(known[name].read_text(encoding="utf-8"))
        return
    rows = {key: _summary(path) for key, path in known.items()}
    if as_json:
        show_json(rows)
        return
    table = grid("spec", "backbone", "passes", "what it is")
    for key, row in rows.items():
        table.add_row(key, row["backbone"], ", ".join(row["passes"]), row["name"])
    show(table)


def _summary(path: Path) -> dict[str, Any]:
    import tomli

    table = tomli.loads(path.read_text(encoding="utf-8"))
    backbone = table.get("backbone", {})
    return {
        "name": table.get("name", ""),
        "backbone": f"{backbone.get('source')}/{backbone.get('name')}",
        "passes": [item.get("use", "?") for item in table.get("pass", [])],
        "file": str(path),
    }
