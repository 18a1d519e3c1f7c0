"""`import graphopt` is light, and has every public name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphopt


@pytest.mark.parametrize("name", graphopt.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(graphopt, name) is not None
    assert name in dir(graphopt)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(graphopt.__file__ or "").read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If))
    imported = {alias.name: str(n.module) for n in checked.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert imported.keys() == set(graphopt.__all__)
    for name, module in imported.items():
        assert getattr(graphopt, name) is getattr(sys.modules[module], name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'graphopt' has no attribute 'nothing'"):
        _ = graphopt.nothing  # type: ignore[attr-defined]


def test_importing_it_loads_nothing() -> None:
    code = "import sys, graphopt, graphopt.errors; print('torch' in sys.modules, 'Plan' in dir(graphopt))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False True\n"


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert graphopt.__version__ == version("graphopt")
