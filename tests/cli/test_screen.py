"""What fits on a screen of any width."""

from __future__ import annotations

import pytest

from graphopt.cli import screen


def test_a_narrow_terminal_gets_several_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(screen, "_PLAIN_WIDTH", 40)
    name = "a name that is longer than a third of it"
    screen.show_columns(["", "accuracy", "difference", "time"], [(name, "93.00 ± 3.61", "-1.50 ± 0.50", "2.00 h")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    for figure in ("93.00 ± 3.61", "-1.50 ± 0.50", "2.00 h"):
        assert any(line.endswith(figure) or f"{figure} " in line for line in lines)
    assert " ".join(line[:13].strip() for line in lines[1:5]) == name


def test_prose_fills_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(screen, "_PLAIN_WIDTH", 24)
    screen.show_prose("One sentence\nin lines of another width.\n\n- an item that is long\n- one\n\n    [[pass]]\n    use = 1\n")
    expected = ["One sentence in lines of", "another width.", "", "- an item that is long", "- one", "", "    [[pass]]", "    use = 1", ""]
    assert capsys.readouterr().out.splitlines() == expected
