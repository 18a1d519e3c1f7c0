"""SVG and PNG, and the commands that write them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graphopt.cli import main
from graphopt.diff import diff
from graphopt.diff.render import picture as pictures
from graphopt.diff.render.picture import to_svg
from graphopt.errors import RunError
from tests.diff.passes import Blend, Ice, Part, Say
from tests.diff.plans import plan

EVIL = "</svg><script>1</script>&amp;\"'\x07"
SPEC = """\
name = "small"
[backbone]
source = "cifar"
name = "resnet8"
arguments = { in_chans = 1 }
input = [1, 8, 8]
[[pass]]
use = "freeze"
select = ["conv1", "bn1", "layer1.**"]
when = { epoch = 2 }
[train]
epochs = 4
batch = 8
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SPEC)
    Path("t.toml").write_text(SPEC.replace('"layer1.**"]\nwhen = { epoch = 2 }', '"layer1.**", "layer2.**"]'))
    return tmp_path


def picture() -> str:
    strange = Say(select="fc", status="frozen", detail={"why": EVIL})
    return to_svg(diff(plan(Ice(select=("stem", "blocks.0")), Blend(select="blocks.1"), Part(select="blocks.2"), strange)))


def test_svg_is_well_formed_and_holds_every_block_as_text() -> None:
    root = ElementTree.fromstring(picture())
    words = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head", "aux.0"} <= set(words)
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert any(w and "backward stops" in w for w in words)


def test_svg_needs_no_style_variables_and_is_deterministic() -> None:
    assert "var(" not in picture()
    assert picture() == picture()


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_node_lays_out_as_the_engine_inside_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = picture()
    monkeypatch.setitem(sys.modules, "py_mini_racer", None)
    assert picture() == inside


def test_without_any_engine_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py_mini_racer", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match="pip install mini-racer"):
        picture()


def test_png_without_browser_and_cairo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    monkeypatch.setattr(pictures, "browser", lambda: None)
    with pytest.raises(RunError, match="Install chromium"):
        pictures.to_png("<svg/>")


@pytest.mark.browser
@pytest.mark.skipif(pictures.browser() is None, reason="there is no Chromium")
def test_png_by_chromium() -> None:
    assert pictures.to_png(picture(), scale=1).startswith(b"\x89PNG\r\n")


def test_diff_of_a_spec_shows_the_phase_that_changes_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "s.toml", "--no-costs"]) == 0
    out = capsys.readouterr().out
    assert "phase 1, from epoch 2: freeze all   (shown)" in out
    assert "freeze (pass 1, line 7)" in out
    assert "the backward pass stops here" in out
    assert main(["diff", "s.toml", "--no-costs", "--epoch", "1"]) == 0
    assert "frozen" not in capsys.readouterr().out


def test_diff_of_two_specs_and_of_two_phases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "s.toml", "t.toml", "--no-costs", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["layer1.0"]["changed"], rows["layer2.0"]["was"], rows["layer2.0"]["statuses"]) == (False, ["kept"], ["frozen"])
    assert main(["diff", "s.toml", "--no-costs", "--json", "--phase", "1", "--phase", "0"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["stem"]["was"], rows["stem"]["statuses"]) == (["frozen"], ["kept"])


def test_every_picture_is_written_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--html": "d.html", "--svg": "d.svg", "--mermaid": "d.mmd", "--dot": "d.dot", "--model-explorer": "d.json"}
    assert main(["diff", "s.toml", "--no-costs", *(word for pair in flags.items() for word in pair)]) == 0
    assert {p.name for p in folder.iterdir()} == {"s.toml", "t.toml", "d.data.json", *flags.values()}
    assert Path("d.html").read_text().startswith("<!doctype html>")
    assert Path("d.mmd").read_text().startswith("flowchart")
    assert Path("d.dot").read_text().startswith("digraph")
    assert json.loads(Path("d.json").read_text())["graphs"][0]["nodes"]
    capsys.readouterr()
    assert main(["diff", "s.toml", "--no-costs", "--mermaid", "-"]) == 0
    assert capsys.readouterr().out == Path("d.mmd").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--svg", "gone/d.svg"], ["gone/d.svg", "its folder does not exist"]),
        (["--html", "."], ["is a folder", "diff.html"]),
        (["--phase", "2"], ["--phase", "s.toml has phases 0 to 1, not 2"]),
        (["--phase", "0", "--epoch", "1"], ["--epoch", "exclude each other"]),
        (["t.toml", "--phase", "0", "--phase", "1"], ["--phase", "at most two"]),
        (["quikstart"], ["quikstart", "no such spec"]),
    ],
)
def test_bad_input_gets_one_message(arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "s.toml", "--no-costs", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert {p.name for p in folder.iterdir()} == {"s.toml", "t.toml"}


def test_apply_writes_both_pictures(folder: Path) -> None:
    assert main(["apply", "s.toml", "-o", "plan", "--verify", "off"]) == 0
    assert {"diff.html", "diff.svg"} <= {p.name for p in (folder / "plan").iterdir()}
