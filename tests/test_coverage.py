"""A sample of `tools/coverage.py`: user-written backbones under some of the passes, verified, forecast and exported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
SAMPLE = (
    "BlocksAverageInPlace",
    "BlocksCheckpointedByPartial",
    "BlocksInPlace",
    "DetachedStem",
    "OpaqueWithUnusedParameters",
    "ReturnsDataclass",
    "TiedWeights",
    "UNet",
)


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The script, under a name that no library looks for."""
    known = set(sys.modules)
    sys.path.append(str(TOOLS))
    specification = importlib.util.spec_from_file_location("tool_coverage", TOOLS / "coverage.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))
    for name in [n for n in set(sys.modules) - known if str(getattr(sys.modules[n], "__file__", "")).startswith(str(TOOLS))]:
        del sys.modules[name]


@pytest.mark.parametrize("name", SAMPLE)
def test_every_cell_is_right_or_refused_with_a_reason(tool: Any, name: str) -> None:
    candidate = next(c for c in tool.candidates() if c.name == f"own/{name}")
    row = tool.cover(candidate, ("behind", "bypass", "supervise", "checkpoint"))
    assert row.words["traced"] == "yes", row.reasons
    assert not set(tool.BAD) & set(row.words.values()), row.reasons
    assert row.words["behind"].startswith("ok")
    assert all(row.reasons.get(column) for column, word in row.words.items() if word == "no")
    assert all(difference == 0 for difference in row.exports)
    assert candidate.name in row.text()


def test_what_cannot_be_compiled_says_why(tool: Any) -> None:
    for name in ("TakesTwoInputs", "TakesDict", "BranchesOnValue", "BlocksScripted", "LayersLazy"):
        row = tool.cover(next(c for c in tool.candidates() if c.name == f"own/{name}"))
        assert row.words == {"traced": "no"}
        assert row.reasons["traced"]
        assert name != "TakesDict" or "takes a dictionary, not an image" in row.reasons["traced"]
