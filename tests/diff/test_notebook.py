"""A notebook shows a plan, and a diff, as a picture."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest

import graphopt
from graphopt.diff import diff
from graphopt.errors import RunError
from tests.diff.passes import Ice
from tests.diff.plans import plan


def shown(value: Any) -> str:
    """What IPython would show, which asks a formatter by type."""
    found: dict[type, Any] = {}
    formatter = SimpleNamespace(for_type=found.__setitem__)
    graphopt.load_ipython_extension(SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": formatter})))
    return str(found[type(value)](value))


@pytest.mark.parametrize("kind", ["plan", "diff"])
def test_it_is_the_picture(kind: str) -> None:
    frozen = plan(Ice(select="stem"))
    text = shown(frozen if kind == "plan" else diff(frozen))
    svg = base64.b64decode(text.partition("base64,")[2].partition('"')[0]).decode()
    assert text.startswith("<img ")
    assert svg.startswith("<svg")
    assert "frozen" in svg


def test_without_an_engine_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise RunError("no JavaScript engine", fix="Run `pip install mini-racer`")

    monkeypatch.setattr("graphopt.diff.notebook.to_svg", refuse)
    assert "pip install mini-racer" in shown(plan(Ice(select="stem")))
