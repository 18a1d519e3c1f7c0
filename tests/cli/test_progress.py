"""What `graphopt check` says while it takes long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.cli import main, progress
from tests.cli.spec import SPEC


def test_a_check_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "AGAIN", 0.01)
    (tmp_path / "s.toml").write_text(SPEC.replace('select = ["conv1", "bn1"]', 'select = ["conv1", "bn1"]\nwhen = { epoch = 1 }'))
    assert main(["check", str(tmp_path / "s.toml"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("{")
    assert all(re.fullmatch(r"note: after \d+ s: \w.* \(Ctrl-C stops it\)", line) for line in err.splitlines())
    assert "tracing the backbone" in err
    assert "phase 2 of 2" in err


def test_items_are_announced_before_they_are_made() -> None:
    said, doing = [], progress.Doing()
    made = (said.append(doing.doing) or number for number in range(3))
    assert list(doing.each("making", made, 3)) == [0, 1, 2]
    assert said == ["making 1 of 3", "making 2 of 3", "making 3 of 3"]
