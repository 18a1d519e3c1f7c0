"""The renderings that are text, held against files a newcomer can read: `golden/`. GRAPHOPT_GOLDEN=1 writes them anew."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from graphopt import Status
from graphopt.diff import Diff
from graphopt.diff.model import STYLES
from graphopt.diff.render.flowchart import to_dot, to_mermaid
from graphopt.diff.render.text import render
from tests.diff.passes import Blend, Ice, Part, Say, Skip, Store
from tests.diff.plans import plan

GOLDEN = Path(__file__).parent / "golden"


def everything() -> Diff:
    """Frozen stem, a mix, a local module with its head, and a name that wants to be code."""
    strange = Say(select="fc", status="frozen", detail={"why": '"<b>#1</b>"'})
    return Diff.of(plan(Ice(select=("stem", "blocks.0")), Blend(select="blocks.1"), Part(select="blocks.2"), strange))


def to_text(diff: Diff, *, unfold: bool = False, nodes: bool = False, colour: bool = False, unicode: bool = True) -> str:
    out = StringIO()
    console = Console(file=out, width=120, force_terminal=colour, color_system="truecolor" if colour else None, legacy_windows=False)
    console.print(render(diff, unfold=unfold, nodes=nodes, unicode=unicode))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


CASES = {
    "plan.txt": lambda: to_text(everything()),
    "plan.nodes.txt": lambda: to_text(everything(), nodes=True, unfold=True, unicode=False),
    "plan.mmd": lambda: to_mermaid(everything()),
    "plan.json": lambda: json.dumps(everything().to_dict(), indent=1, ensure_ascii=False) + "\n",
    "two.txt": lambda: to_text(Diff.of(plan(Skip(select="blocks.2")), plan(Store(select="blocks.0")))),
    "two.mmd": lambda: to_mermaid(Diff.of(plan(Skip(select="blocks.2")), plan(Store(select="blocks.0"))), unfold=True),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    found, path = CASES[name](), GOLDEN / name
    if os.environ.get("GRAPHOPT_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def test_no_two_statuses_look_alike_without_colour() -> None:
    for sign in ("glyph", "ascii"):
        signs = [getattr(style, sign) for style in STYLES.values()]
        assert len(set(signs)) == len(signs)
        assert all(len(s) == 1 for s in signs)


def test_every_status_that_a_pass_can_give_has_a_style() -> None:
    assert set(Status) <= set(STYLES)


def test_ascii_is_ascii_but_for_the_guides() -> None:
    text = to_text(everything(), unicode=False)
    assert not set(text) - set("├─│└ ") - {chr(c) for c in range(128)}


def test_colour_is_there_when_asked_for() -> None:
    assert "\x1b[" in to_text(everything(), colour=True)
    assert "\x1b[" not in to_text(everything())


def test_mermaid_and_dot_keep_strange_names_as_text() -> None:
    mermaid, dot = to_mermaid(everything()), to_dot(everything())
    assert "#quot;#lt;b#gt;#35;1#lt;/b#gt;#quot;" in mermaid
    assert "<b>#1" not in mermaid
    assert '\\"<b>#1</b>\\"' in dot
    assert dot.count("{") == dot.count("}")
