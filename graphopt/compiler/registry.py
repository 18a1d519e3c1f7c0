"""Installed passes by name, found through the entry-point group `graphopt.passes` only. A pass is loaded when it is asked for."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from graphopt.compiler.pass_base import Pass
from graphopt.errors import PassError


def passes() -> dict[str, type[Pass]]:
    """Every installed pass, by the name specs use. Raises as `load`."""
    return {name: load(name) for name in names()}


def names() -> list[str]:
    """The names of the installed passes, sorted; none of them is loaded. Raises PassError if two have the same name."""
    return sorted(_entries())


@cache
def load(name: str) -> type[Pass]:
    """An installed pass. Raises PassError if it does not load or is no `Pass`."""
    entry = _entries()[name]
    where = _where(entry)
    try:
        loaded = entry.load()
    except Exception as error:
        fix = "Repair or uninstall the package that provides it"
        raise PassError(f"the pass cannot be loaded: {error}", where=where, fix=fix) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise PassError("it does not name a subclass of graphopt.Pass", where=where, fix="Name one there")
    if getattr(loaded, "name", None) != name:
        raise PassError(f"its class has the name {getattr(loaded, 'name', None)!r}", where=where, fix="Give the entry point that name")
    return loaded


@cache
def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group="graphopt.passes"):
        if found.setdefault(entry.name, entry).value != entry.value:
            what = f"two installed packages provide a pass called {entry.name!r}"
            raise PassError(what, where=_where(entry), fix="Uninstall one of them")
    return found


def _where(entry: EntryPoint) -> str:
    return f"entry point {entry.name} = {entry.value}"
