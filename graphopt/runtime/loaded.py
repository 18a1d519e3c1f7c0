"""Classes and functions of libraries that a network may be made of, without importing them: a network that has one has imported it."""

import sys
from typing import Any


def loaded(module: str, *names: str) -> tuple[Any, ...]:
    """`getattr(module, name)` for each name, where somebody has imported the module; nothing where nobody has, or it lacks the name."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))
