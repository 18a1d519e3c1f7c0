"""What a pass does to a graph, as text that a reviewer can read: one file a case.

A file holds the spec, the graph before it and the graph after it. `pytest tests/test_golden.py --update-golden` writes the graphs anew; a
new case is a file with a spec alone, and that flag.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import graphopt
from graphopt.ir.printing import graph_text
from graphopt.spec import loads

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(FOLDER.glob("*.txt"))
BEFORE, AFTER = "\n# The graph before\n", "\n# The graph after\n"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_graph_is_the_one_on_file(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    spec = text.partition(BEFORE)[0].strip() + "\n"
    plan = graphopt.compile(None, loads(spec, file=path.name), verify="off", costs=False)
    found = f"{spec}{BEFORE}{graph_text(plan.sizes.whole)}{AFTER}{graph_text(plan.graph)}"
    if request.config.getoption("--update-golden"):
        path.write_text(found)
    assert found == text or request.config.getoption("--update-golden"), f"{path.name} differs; --update-golden writes it anew"


def test_every_pass_has_a_case() -> None:
    from graphopt.compiler.registry import passes

    covered = {spec.partition("-")[0] for spec in (path.stem for path in CASES)}
    assert passes().keys() <= covered
