"""The measuring scripts: each imports, so that a renamed name is noticed; what they measure is in tools/tables."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_it_imports(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tool.parent)
    names = runpy.run_path(str(tool), run_name="imported")
    assert names["__doc__"]
