"""Imports run one way, late ones and those for type checkers included: docs/architecture.md has the picture."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: from the ground up; a file may import what stands on its own line or further up, and nothing further down
LAYERS = (
    ("errors", "units", "files", "hashing", "code", "runtime"),
    ("ir",),
    ("tracing", "models"),
    ("cost",),
    ("compiler",),
    ("spec",),
    ("driver",),
    ("passes", "plan_file", "specs"),
    ("data",),
    ("train",),
    ("testing", "planning"),
    ("diff",),
    ("studies", "timm_args"),
    ("cli", "__main__"),
)
#: packages on one line where the first may not import the second
APART = {("tracing", "models"), ("passes", "plan_file"), ("runtime", "files"), ("units", "files")}
#: what takes long to import
HEAVY = {"torch", "timm", "torchvision", "sklearn", "scipy", "networkx", "safetensors"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name, with `passes/` and `specs/` where they are installed."""
    found = {}
    for folder, prefix in (("graphopt", "graphopt"), ("passes", "graphopt.passes"), ("specs", "graphopt.specs")):
        for file in (root / folder).rglob("*.py"):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = file
    return found


def on_top(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            pending += ast.iter_child_nodes(node)


def ways_to_torch(root: Path, starts: Iterable[str]) -> list[str]:
    """How importing one of `starts` imports something heavy: `graphopt.spec -> graphopt.spec.model -> torch`."""
    known, found = modules(root), []
    offers = _offers(known["graphopt"])
    pending = [(name,) for name in starts]
    seen: set[str] = set()
    while pending:
        way = pending.pop()
        for node in on_top(ast.parse(known[way[-1]].read_text())):
            for target in targets(node, known, offers):
                if target.split(".")[0] in HEAVY:
                    found.append(" -> ".join((*way, target)))
                elif target in known and target not in seen:
                    seen.add(target)
                    pending.append((*way, target))
    return found


def targets(node: ast.Import | ast.ImportFrom, known: Mapping[str, Path], offers: Mapping[str, str]) -> Iterator[str]:
    """The modules that an import loads, with the packages around them; `from graphopt import Pass` loads where `Pass` stands."""
    if isinstance(node, ast.Import):
        named = [alias.name for alias in node.names]
    elif node.module == "graphopt":
        named = [offers.get(alias.name, f"graphopt.{alias.name}") for alias in node.names]
    else:
        named = [str(node.module), *(name for alias in node.names if (name := f"{node.module}.{alias.name}") in known)]
    for name in named:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(2, len(parts)))
        yield name


def _offers(front: Path) -> dict[str, str]:
    """The names of the front page, and the module of each."""
    (checked,) = (node for node in ast.parse(front.read_text()).body if isinstance(node, ast.If))
    return {alias.name: str(node.module) for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}


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


def test_the_command_line_and_specs_load_no_torch() -> None:
    known = modules(ROOT)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["graphopt.passes"].values()
    starts = [name for name in known if name.split(".")[1:2] in (["cli"], ["spec"], ["timm_args"])]
    assert ways_to_torch(ROOT, [*starts, *(entry.partition(":")[0] for entry in entries)]) == []


def test_the_compiler_knows_no_pass_by_name() -> None:
    """Passes are found by entry point: outside of passes/, no code has the name of one (but for options of timm that are called so)."""
    names = {file.stem for file in (ROOT / "passes").iterdir() if not file.stem.startswith("_")}
    found = []
    for name, file in modules(ROOT).items():
        if not name.startswith(("graphopt.passes", "graphopt.specs", "graphopt.timm_args")):
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


def test_a_way_to_torch_is_found(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from graphopt.ir.b import B",
        "cli/a.py": "from graphopt import B\ndef f():\n    import timm",
        "ir/b.py": "try:\n    from torch import nn\nexcept ImportError:\n    pass",
    }.items():
        (tmp_path / "graphopt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "graphopt" / name).write_text(text)
    assert ways_to_torch(tmp_path, ["graphopt.cli.a"]) == ["graphopt.cli.a -> graphopt.ir.b -> torch"]
