"""A working directory with a small spec in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.spec import SPEC


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SPEC)
    return tmp_path
