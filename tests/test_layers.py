"""Imports run one way, late ones and those for type checkers included: docs/architecture.md has the picture."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: from the ground up; a file may import what stands on its own line or further up, and nothing further down
LAYERS = (
    ("errors", "units", "files", "hashing", "runtime"),
    ("ir",),
    ("tracing", "models"),
    ("cost",),
    ("compiler",),
    ("spec",),
    ("driver",),
    ("passes", "plan_file", "specs"),
    ("data",),
    ("train",),
    ("planning",),
    ("diff",),
    ("cli", "__main__"),
)
#: packages on one line where the first may not import the second
APART = {("tracing", "models"), ("passes", "plan_file"), ("runtime", "files"), ("units", "files")}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name, with `passes/` and `specs/` where they are installed."""
    found = {}
    for folder, prefix in (("graphopt", "graphopt"), ("passes", "graphopt.passes"), ("specs", "graphopt.specs")):
        for file in (root / folder).rglob("*.py"):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = file
    return found


def imported(name: str, file: Path, known: Mapping[str, Path]) -> set[str]:
    """The package's modules that a file imports, wherever in the file that happens."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "graphopt":
            found |= {n if (n := f"{node.module}.{alias.name}") in known else str(node.module) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return (found & known.keys()) - {name}


def violations(root: Path) -> list[str]:
    """What breaks the rules: circles, and imports that point down the list of layers."""
    known = modules(root)
    edges = {name: imported(name, file, known) for name, file in known.items() if name != "graphopt"}
    # The package's own front page imports what it offers; passes may import it, because it loads names when they are asked for.
    edges = {name: {other for other in others if other != "graphopt"} for name, others in edges.items()}
    found = []
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    for name, others in sorted(edges.items()):
        for other in sorted(others):
            mine, theirs = name.split(".")[1], other.split(".")[1]
            if mine not in LEVEL:
                found.append(f"{name} is in no layer")
            elif LEVEL.get(theirs, 99) > LEVEL[mine] or (mine, theirs) in APART:
                found.append(f"{name} -> {other}")
    return list(dict.fromkeys(found))


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


def test_the_compiler_knows_no_pass_by_name() -> None:
    """Passes are found by entry point: no file outside of passes/ has the name of one in its code."""
    names = {file.stem for file in (ROOT / "passes").iterdir() if not file.stem.startswith("_")}
    found = []
    for name, file in modules(ROOT).items():
        if not name.startswith(("graphopt.passes", "graphopt.specs")):
            constants = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant))
            found += [f"{name}:{node.lineno} {node.value!r}" for node in constants if node.value in names]
    assert found == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ir/a.py": "from graphopt.compiler.b import x", "compiler/b.py": "x = 1"}, r"graphopt\.ir\.a -> graphopt\.compiler\.b"),
        ({"ir/a.py": "def f():\n    from graphopt.ir.b import x", "ir/b.py": "from graphopt.ir.a import f"}, "circle"),
        ({"strange.py": "import graphopt.ir.a", "ir/a.py": ""}, "in no layer"),
    ],
    ids=["layer", "late circle", "unknown"],
)
def test_violations_are_found(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / "graphopt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "graphopt" / name).write_text(text)
    assert any(re.search(message, line) for line in violations(tmp_path))
