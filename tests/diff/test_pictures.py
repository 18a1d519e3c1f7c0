"""SVG and PNG, and the commands that write them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from graphopt.cli import main
from graphopt.diff import Diff
from graphopt.diff.align import group_name
from graphopt.diff.phases import phase_diffs
from graphopt.diff.render import picture as pictures
from graphopt.diff.render.picture import to_svg
from graphopt.errors import RunError
from graphopt.passes.supervise import Supervise
from tests.diff.passes import Blend, Ice, Part, Say, Skip
from tests.diff.plans import plan
from tests.support.backbones import Residual, Small

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
    return to_svg(Diff.of(plan(Ice(select=("stem", "blocks.0")), Blend(select="blocks.1"), Part(select="blocks.2"), strange)))


class Dense(nn.Module):
    """Every layer reads what all before it gave."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8 * (i + 1), 8, 1) for i in range(layers))
        self.last = nn.Conv2d(8 * (layers + 1), 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return self.last(torch.cat(found, 1))


def test_edges_that_pass_by_many_operations_run_beside_them_in_a_lane_for_each_source() -> None:
    model = Small(blocks=0)
    model.blocks.extend(Dense(16) for _ in range(2))
    svg = to_svg(Diff.of(plan(model=model)), level="operations")
    lanes = set()
    for path in re.findall(r'class="wire" d="([^"]+)"', svg):
        points = [tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
        assert points[-1][1] > points[0][1]  # it leads down
        lanes |= {x for (x, y), (other, end) in pairwise(points) if x == other and end - y > 100}
    assert len(lanes) == 15  # the last layer's output is read by the next operation alone
    assert max(lanes) < 400


def test_local_modules_have_the_colour_and_the_number_of_their_rank() -> None:
    made = plan(Supervise(modules=2))
    boxes = [e.get("class") for e in ElementTree.fromstring(to_svg(phase_diffs(made, ranks=2))).iter("{http://www.w3.org/2000/svg}g")]
    assert [c for c in boxes if c and c.startswith("box")] == ["box local rank1", "box local rank0"]
    text = to_svg(phase_diffs(made, ranks=2))
    assert "local module 1 · rank 1: stem" in text
    assert "last module · rank 0: " in text
    assert "rank" not in to_svg(phase_diffs(made)).split("</style>")[1]
    with pytest.raises(RunError, match="2 gradient-isolated modules for 3 processes"):
        phase_diffs(made, ranks=3)


def test_svg_is_well_formed_and_holds_every_block_as_text() -> None:
    root = ElementTree.fromstring(picture())
    words = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head", "aux.0"} <= set(words)
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert any(w and "backward stops" in w for w in words)


def test_svg_needs_no_style_variables_and_is_deterministic() -> None:
    assert "var(" not in picture()
    assert picture() == picture()


def test_operations_have_a_place_each() -> None:
    root = ElementTree.fromstring(to_svg(Diff.of(plan(Ice(select=("stem", "blocks.0")), Skip(select="blocks.1"))), level="operations"))
    for piece in root.iter("{http://www.w3.org/2000/svg}g"):
        places = [op.get("transform") for op in piece.findall("{http://www.w3.org/2000/svg}g[@transform]")]
        assert len(places) == len(set(places))


def test_what_is_too_long_is_cut_where_it_tells_least_and_no_figure_is_cut() -> None:
    layers = {f"encoder_layer_{n}": Residual(8) for n in range(4)}
    net = nn.Sequential(OrderedDict(backbone=nn.Sequential(OrderedDict(transformer_encoder=nn.Sequential(OrderedDict(layers))))))
    frozen = Ice(select=[f"backbone.transformer_encoder.encoder_layer_{n}" for n in (1, 2)])
    root = ElementTree.fromstring(to_svg(Diff.of(plan(frozen, model=net, input=(8, 8, 8), costs=True))))
    found = {c: [t.text or "" for t in root.iter() if t.get("class", "").startswith(c)] for c in ("name", "small", "big", "cost", "what")}
    assert found["name"] == [f"encoder_layer_{n}" for n in range(4)]
    assert group_name([f"encoder.layers.encoder_layer_{n}" for n in range(3)]) == "encoder.layers.encoder_layer_0-2 ×3"
    assert not [text for c in ("small", "big", "cost", "what") for text in found[c] if "…" in text]
    assert found["small"]


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


@pytest.mark.parametrize("draw", [pictures.to_png, pictures.to_pdf])
def test_without_browser_and_cairo_it_says_what_to_install(draw: Callable[[str], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    monkeypatch.setattr(pictures, "browser", lambda: None)
    with pytest.raises(RunError, match="Install chromium"):
        draw("<svg/>")


@pytest.mark.browser
@pytest.mark.skipif(pictures.browser() is None, reason="there is no Chromium")
def test_png_and_pdf_by_chromium() -> None:
    svg = picture()
    assert pictures.to_png(svg, scale=1).startswith(b"\x89PNG\r\n")
    made = pictures.to_pdf(svg)
    assert made.startswith(b"%PDF-")
    assert made.count(b"/Type /Page\n") == 1, "one page, of the picture's size"
    width, height = (float(n) * 4 / 3 for n in re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", made).groups())
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert abs(width - float(size[1])) < 2
    assert abs(height - float(size[2])) < 2


def test_a_file_has_a_key_of_its_arrows_and_no_buttons() -> None:
    text = picture().split("</style>")[1]
    for meaning in ("gradients come back", "no gradient comes back", "into a local loss", "weights"):
        assert f">{meaning}</text>" in text
    assert "data-fold" not in text


def test_diff_of_a_spec_shows_the_phase_that_changes_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "s.toml", "--no-costs"]) == 0
    out = capsys.readouterr().out
    assert "phase 1, from epoch 2: freeze all   (shown)" in out
    assert "freeze (pass 1, line 7)" in out
    assert "the backward pass stops here" in out
    assert main(["diff", "s.toml", "--no-costs", "--epoch", "1"]) == 0
    assert "frozen" not in capsys.readouterr().out


def test_an_unnamed_spec_is_called_by_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text(SPEC.replace('name = "small"\n', ""))
    assert main(["diff", "mine.toml", "--no-costs", "--json"]) == 0
    heading = json.loads(capsys.readouterr().out)["after"]
    assert (heading["title"], heading["spec"]) == ("mine", "mine.toml")


def test_diff_of_two_specs_and_of_two_phases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "s.toml", "t.toml", "--no-costs", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["layer1.0"]["changed"], rows["layer2.0"]["was"], rows["layer2.0"]["statuses"]) == (False, ["unchanged"], ["frozen"])
    assert main(["diff", "s.toml", "--no-costs", "--json", "--phase", "1", "--phase", "0"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["stem"]["was"], rows["stem"]["statuses"]) == (["frozen"], ["unchanged"])


def test_every_picture_is_written_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--html": "d.html", "--svg": "d.svg", "--mermaid": "d.mmd", "--dot": "d.dot", "--model-explorer": "d.json"}
    assert main(["diff", "s.toml", "--no-costs", *(word for pair in flags.items() for word in pair)]) == 0
    assert {p.name for p in folder.iterdir()} == {"s.toml", "t.toml", "d.data.json", "d.sync.json", *flags.values()}
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
        (["--epoch", "99"], ["--epoch", "the run has epochs 0 to 3, not 99"]),
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
