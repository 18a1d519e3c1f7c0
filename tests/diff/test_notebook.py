"""A notebook shows a plan, and a diff, as a picture, and a report as tables."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

import graphopt
from graphopt.compiler.plan import Plan
from graphopt.errors import RunError
from tests.diff.passes import Ice, Skip
from tests.diff.plans import plan


@pytest.mark.parametrize("view", [lambda p: p, Plan.diff], ids=["plan", "diff"])
def test_it_is_the_picture(view: Callable[[Plan], Any]) -> None:
    text = view(plan(Ice(select="stem")))._repr_html_()
    svg = base64.b64decode(text.partition("base64,")[2].partition('"')[0]).decode()
    assert text.startswith("<img ")
    assert svg.startswith("<svg")
    assert "frozen" in svg


def test_a_plan_has_its_diff_alone_and_against_another() -> None:
    first, other = plan(Ice(select="stem")), plan(Skip(select="blocks.2"))
    assert first.diff().counts() == {"frozen": 1, "unchanged": 5}
    assert isinstance(first.diff(other), graphopt.Diff)
    assert {r.name: (r.was, r.statuses) for r in first.diff(other).rows if r.changed} == {
        "stem": (("frozen",), ("unchanged",)),
        "blocks.2": (("unchanged",), ("bypassed",)),
    }
    assert repr(first.diff()) == "Diff('Small', 'Small', {'frozen': 1, 'unchanged': 5})"


def test_without_an_engine_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise RunError("no JavaScript engine", fix="Run `pip install mini-racer`")

    monkeypatch.setattr("graphopt.diff.notebook.to_svg", refuse)
    text = plan(Ice(select="stem"))._repr_html_()
    assert "pip install mini-racer" in text
    assert "Plan(&#x27;Small&#x27;" in text


def test_a_report_is_two_tables() -> None:
    report = plan(Ice(select="stem"), costs=True).report
    figures, passes = report.tables()
    assert figures.head == ("a training step, batch 4", "before", "after", "change")
    assert ("trainable parameters", "5,050", "4,826", "-4.4 %") in figures.rows
    assert passes.rows[0][0] == "1 ice"
    assert "cold <b>here</b>" in passes.rows[0][3]
    assert [t.head[0] for t in plan(Ice(select="stem")).report.tables()] == ["pass"], "without costs"


def test_a_report_is_html_and_markdown_that_show_names_as_they_are() -> None:
    report = plan(Ice(select="stem"), costs=True).report
    page = ElementTree.fromstring(f"<div>{report._repr_html_()}</div>")
    assert [len(list(t.iter("tr"))) for t in page.iter("table")] == [8, 2]
    assert not list(page.iter("h1")), "cold <b>here</b> is text"
    assert any("cold <b>here</b>" in "".join(cell.itertext()) for cell in page.iter("td"))
    assert "| trainable parameters | 5,050 | 4,826 | -4.4 % |" in str(report)
    assert r"cold \<b\>here\</b\>" in str(report)
    lines = [line for line in str(report).splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {3}
