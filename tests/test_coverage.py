"""A sample of `tools/coverage.py`: user-written backbones under some of the passes, verified, forecast and exported."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
#: user-written backbones; each goes through one pass, in turn
SAMPLE = (
    *("AssertsOnShape", "BlocksAverageInPlace", "BlocksBranchOnValue", "BlocksCheckpointedByPartial", "BlocksCountInBuffers"),
    *("BlocksInPlace", "BlocksReassignBuffers", "BlocksWithTwoOutputs", "DetachedStem", "Fourier", "ReturnsDict"),
    *("HooksOnBlocks", "ListsOfScales", "LoopsOverSize", "MlpMixer", "MultiheadAttention", "NormsAverageAllBatches", "NormsWithoutState"),
    *("OneBlockTwice", "OpaqueWithUnusedParameters", "PadsToMultiple", "ReturnsDataclass", "ReturnsFeatures", "ReturnsTuple"),
    *("Sequence", "SpectralNorms", "TakesThreeInputs", "TakesTwoInputs", "TiedWeights", "TransformerEncoder", "UNet", "WeightNorms"),
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


@pytest.mark.parametrize(("number", "name"), list(enumerate(SAMPLE)))
def test_every_cell_is_right_or_refused_with_a_reason(tool: Any, number: int, name: str) -> None:
    candidate = next(c for c in tool.candidates() if c.name == f"own/{name}")
    row = tool.cover(candidate, (tool.CELLS[number % len(tool.CELLS)],))
    assert row.words["traced"] == "yes", row.reasons
    assert row.good, row.bad
    assert all(row.reasons.get(column) for column, word in row.words.items() if word == "no")
    assert all(difference == 0 for difference in row.exports)
    assert candidate.name in row.text()


def test_what_cannot_be_compiled_says_why(tool: Any) -> None:
    for name in ("TakesDict", "BranchesOnValue", "DropsLayersByPython", "BlocksScripted", "LayersLazy"):
        row = tool.cover(next(c for c in tool.candidates() if c.name == f"own/{name}"))
        assert row.words == {"traced": "no"}
        assert row.reasons["traced"]
        assert name != "TakesDict" or "takes a dictionary, not an image" in row.reasons["traced"]


def test_a_run_is_continued_with_the_rows_that_are_missing_or_not_good(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ReturnsDict", "TakesDict", "LayersLazy")
    own = itertools.takewhile(lambda c: c.name.startswith("own/"), tool.candidates())
    chosen = [c for c in own if c.name.removeprefix("own/") in names]

    def covered(candidate: Any, cells: Any = ()) -> Any:
        if candidate.name == "own/LayersLazy" and not (tmp_path / "again").exists():
            os._exit(3)
        return tool.Row(candidate.name).put("traced", "yes")

    monkeypatch.setattr(tool, "cover", covered)
    monkeypatch.setattr(tool, "candidates", lambda _folder=None: iter(chosen))
    arguments = ["coverage", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "table.md"), "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert tool.main() == 1
    assert "its process ended with 3" in (tmp_path / "table.md").read_text()
    (tmp_path / "again").touch()
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume"])
    assert tool.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == ["own/LayersLazy", "own/LayersLazy", "own/ReturnsDict", "own/TakesDict"]
