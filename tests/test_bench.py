"""The bench compares its ratios with the table's last row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    monkeypatch.delitem(sys.modules, "bench", raising=False)
    import bench

    return bench


def test_a_row_is_appended_and_what_is_a_fifth_worse_ends_with_status_1(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, values = tmp_path / "bench.md", {"start": 1.0, "loader": 1.0}
    ratios = {name: bench.Ratio(name, lambda name=name: values[name], less=name == "start") for name in values}
    monkeypatch.setattr(bench, "RATIOS", ratios)
    assert bench.main(["--out", str(table)]) == 0
    for start, loader, status in ((1.19, 0.85, 0), (1.45, 0.85, 1), (1.45, 0.7, 1), (0.1, 9.0, 0)):
        values.update(start=start, loader=loader)
        assert bench.main(["--out", str(table)]) == status
    assert bench.last_row(table.read_text()) == values
    assert "loader: 0.85 before, 0.7 now" in capsys.readouterr().out
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert bench.main(["--only", "loader"]) == 0
