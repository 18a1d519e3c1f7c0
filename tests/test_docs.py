"""What the pages in docs/ say is run: files that they show are written, commands and Python run in order, output is compared.

A page is a session of its own in an empty folder. A block with a title is a file; `sh` holds commands that succeed; `console` holds
commands after `$`, with what they print (`...` stands for what is left out); `python` runs; a `toml` block without a title is a spec or
passes of one. `<!-- shown only: REASON -->` above a block leaves it out.
"""

from __future__ import annotations

import ast
import doctest
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from graphopt.cli import main
from graphopt.spec import loads
from graphopt.timm_args import OPTIONS
from tests.support.ranks import serve

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r'^(<!-- shown only: (?P<reason>.+?) -->\n)?```(?P<kind>\w*)( title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```', re.M | re.S)
BASE = '[backbone]\nsource = "cifar"\nname = "resnet8"\ninput = [3, 16, 16]\n'


class Block(NamedTuple):
    kind: str
    file: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["kind"], m["file"], m["text"]) for m in found if m["reason"] is None]


class Session:
    """What one page has done so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.scope = capsys, {"__name__": "page"}

    def run(self, block: Block) -> None:
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif (act := getattr(self, block.kind, None)) is not None:
            act(block.text)
        else:
            assert block.kind in ("", "text", "mermaid"), f"a block of kind {block.kind!r}: mark it as shown only, with the reason"

    def command(self, line: str) -> tuple[int, str]:
        words = shlex.split(line, comments=True)
        line, _, target = " ".join(map(shlex.quote, words)).partition(" '>' ")
        assert words[0] == "graphopt", line
        if words[1] == "study":
            serve()
        status = main(shlex.split(line)[1:])
        out, err = self.capsys.readouterr()
        if target:
            Path(target).write_text(out, encoding="utf-8")
        return status, out + err

    def sh(self, text: str) -> None:
        for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
            status, out = self.command(line)
            assert status == 0, f"{line}\n{out}"

    def console(self, text: str) -> None:
        for part in text.split("$ ")[1:]:
            line, _, expected = part.partition("\n")
            _, out = self.command(line)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(expected, out, flags), f"$ {line}\n{out}\n---- expected:\n{expected}"

    def python(self, text: str) -> None:
        exec(compile(text, "page", "exec"), self.scope)

    def toml(self, text: str) -> None:
        table = tomllib.loads(text)
        if "project" not in table:
            assert loads(text if "backbone" in table else BASE + text, file="page")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # a page imports the files that it shows
    monkeypatch.setenv("COLUMNS", "120")
    session = Session(capsys)
    for block in blocks(page):
        session.run(block)


def test_the_notebook_runs() -> None:
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    scope: dict[str, Any] = {"__name__": "notebook"}
    shown = [_shown("".join(cell["source"]), scope) for cell in cells if cell["cell_type"] == "code" and not cell["outputs"]]
    assert len(scope["losses"]) == 8
    assert [text[:5] for text in shown if text] == ["<img ", "<p><b", "<img "]


def _shown(source: str, scope: dict[str, Any]) -> str | None:
    """Runs a cell; what a notebook shows of the value of its last line, where that has a view of its own."""
    tree = ast.parse(source, "tutorial.ipynb")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "tutorial.ipynb", "exec"), scope)
    value = None if last is None else eval(compile(ast.Expression(last.value), "tutorial.ipynb", "eval"), scope)
    return value._repr_html_() if hasattr(value, "_repr_html_") else None


def test_every_pass_has_a_page_with_its_manual() -> None:
    from graphopt.compiler.registry import passes

    for use in passes():
        assert f"<!-- manual: {use} -->" in (ROOT / "docs" / "passes" / f"{use}.md").read_text(encoding="utf-8")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import runpy

    return runpy.run_path(str(ROOT / "tools" / "docs_pages.py"))


def test_what_is_made_at_build_time_covers_schema_and_names(pages: dict[str, Any]) -> None:
    import graphopt

    made = pages["generated"]()
    for key in ("`epochs`", "`cutmix`", "[[pass]] freeze", "`reset`"):
        assert key in made["spec.md"]
    for name in {*graphopt.__all__} - {"Selector"}:
        assert f".{name}\n" in made["api.md"]
    assert "lean" in pages["manual"]("freeze")
    options = pages["timm_options"]()
    for option in OPTIONS.values():
        assert f"| `{option.name}` |" in options
        assert all(text.replace("|", "\\|") in options for text in (option.keys, option.refused, option.unused))


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("index.md", "docs/passes.md", "passes.md"),
        ("index.md", "tools/tables", "tables/index.md"),
        ("modules.md", "../tools/tables/modules.md", "tables/modules.md"),
        ("passes/share.md", "../../tools/tables/share_table.md", "../tables/share_table.md"),
        ("tutorial.md", "passes/freeze.md", "passes/freeze.md"),
        ("passes.md", "../README.md", "index.md"),
    ],
)
def test_links_to_files_lead_to_pages(pages: dict[str, Any], page: str, link: str, there: str) -> None:
    assert pages["relinked"](f"[x]({link}#y) [z]({link})", page) == f"[x]({there}#y) [z]({there})"
