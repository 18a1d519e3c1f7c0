"""Installed passes by name, found through the entry-point group `graphopt.passes` only."""

from functools import lru_cache
from importlib.metadata import entry_points

from graphopt.compiler.pass_base import Pass
from graphopt.errors import PassError


@lru_cache(maxsize=1)
def passes() -> dict[str, type[Pass]]:
    """Every installed pass, by the name specs use. Raises PassError if one does not load or is no `Pass`, or two have the same name."""
    found: dict[str, type[Pass]] = {}
    for entry in sorted(entry_points(group="graphopt.passes"), key=lambda e: e.name):
        where = f"entry point {entry.name} = {entry.value}"
        try:
            loaded = entry.load()
        except Exception as error:
            fix = "Repair or uninstall the package that provides it"
            raise PassError(f"the pass cannot be loaded: {error}", where=where, fix=fix) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise PassError("it does not name a subclass of graphopt.Pass", where=where, fix="Name one there")
        if getattr(loaded, "name", None) != entry.name:
            raise PassError(f"its class has the name {getattr(loaded, 'name', None)!r}", where=where, fix="Give the entry point that name")
        if found.setdefault(entry.name, loaded) is not loaded:
            raise PassError(f"two installed packages provide a pass called {entry.name!r}", where=where, fix="Uninstall one of them")
    return found
