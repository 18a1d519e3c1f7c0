"""Two backbones are matched by what their blocks compute; two sets of weights, in numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphopt.cli import main
from graphopt.diff import Diff
from graphopt.diff.match import KIND, NAME, RESIZED, SAME, matched
from tests.diff.passes import Ice, Part
from tests.diff.plans import Copy, plan
from tests.support.backbones import Residual, Small


def statuses(found: Diff) -> dict[str, tuple[str, ...]]:
    return {r.name: r.statuses for r in found.rows if r.statuses != ("unchanged",)}


def test_another_depth_adds_blocks() -> None:
    found = Diff.of(plan(), plan(model=Small(blocks=6)))
    assert statuses(found) == {"blocks.4": ("added",), "blocks.5": ("added",)}
    assert statuses(Diff.of(plan(model=Small(blocks=6)), plan())) == {"blocks.4": ("removed",), "blocks.5": ("removed",)}


def test_another_width_is_a_difference_in_sizes() -> None:
    found = Diff.of(plan(), plan(model=Small(width=16)))
    assert set(statuses(found).values()) == {("differs",)}
    row = next(r for r in found.rows if r.name == "blocks.1")
    assert row.detail == {"input": "N×8×8×8 → N×16×8×8", "output": "N×8×8×8 → N×16×8×8"}
    assert {n.statuses for n in row.nodes} == {("differs",)}


def test_a_copy_under_other_names_is_the_same_network() -> None:
    found = Diff.of(plan(), plan(model=Copy()))
    assert statuses(found) == {}
    assert [r.former for r in found.rows] == [None, "blocks.0", "blocks.1", "blocks.2", "blocks.3", None]
    assert "4 under another name in the first" in found.notes[0]
    assert {kind for _, _, kind in found.edges} == {"both"}


def test_what_was_edited_in_a_copy_is_found_down_to_the_operation() -> None:
    found = Diff.of(plan(), plan(model=Copy(lambda width: nn.GroupNorm(2, width))))
    assert statuses(found) == {"body.2": ("differs",)}
    row = next(r for r in found.rows if r.name == "body.2")
    changed = {n.name: n.statuses for n in row.nodes if n.statuses != ("unchanged",)}
    assert changed == {
        "body_2_bn1": ("added",),
        "body_2_bn2": ("added",),
        "blocks_2_bn1": ("removed",),
        "blocks_2_bn2": ("removed",),
    }
    json.dumps(found.to_dict())


def test_a_setting_is_a_difference_of_its_operation() -> None:
    found = Diff.of(plan(), plan(model=Copy(lambda width: nn.BatchNorm2d(width, eps=0.1))))
    assert statuses(found) == {"body.2": ("differs",)}
    row = next(r for r in found.rows if r.name == "body.2")
    assert [n.name for n in row.nodes if n.statuses == ("differs",)] == ["body_2_bn1", "body_2_bn2"]
    assert row.detail == {"settings": "of its operations"}


def test_a_name_that_means_another_block_is_told_apart() -> None:
    one, other = Small(blocks=3), Small(blocks=2)
    one.blocks[0] = Residual(8, 0.3, lambda width: nn.GroupNorm(2, width))
    found = Diff.of(plan(model=one), plan(model=other))
    assert [(r.name, r.former, r.statuses) for r in found.rows[1:-1]] == [
        ("blocks.0 (first)", "blocks.0", ("removed",)),
        ("blocks.0", "blocks.1", ("unchanged",)),
        ("blocks.1", "blocks.2", ("unchanged",)),
    ]


def test_passes_do_not_hide_what_is_the_same() -> None:
    found = Diff.of(plan(Ice(select="blocks.0")), plan(Part(select="blocks.1"), model=Small(blocks=5)))
    assert {r.name for r in found.rows if "added" in r.statuses} == {"blocks.4", "aux.0"}
    assert not [r.name for r in found.rows if {"removed", "differs"} & set(r.statuses)]


@pytest.mark.parametrize(
    ("old", "new", "pairs"),
    [
        ("abc", "abc", [(0, 0), (1, 1), (2, 2)]),
        ("abc", "aXbc", [(0, 0), (1, 2), (2, 3)]),
        ("aXbc", "abc", [(0, 0), (2, 1), (3, 2)]),
        ("aBc", "abc", [(0, 0), (1, 1), (2, 2)]),
        ("xa", "ay", [(1, 0)]),
        ("", "ab", []),
    ],
)
def test_the_alignment_has_the_highest_score(old: str, new: str, pairs: list[tuple[int, int]]) -> None:
    def score(a: str, b: str) -> int:
        return SAME + NAME if a == b else RESIZED if a.lower() == b.lower() else 0

    assert matched(old, new, score) == pairs
    assert SAME > RESIZED > KIND > NAME > 0


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    from graphopt.models.build import build

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build("cifar", "resnet8", {"in_chans": 1})
    save_file(model.state_dict(), "a.safetensors")
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.weight").mul_(1.01)
    save_file(model.state_dict(), "b.safetensors")
    return "a.safetensors", "b.safetensors"


SMALL = ["--no-costs", "--set", "backbone.arguments.in_chans=1", "--set", "backbone.input=[1,8,8]"]


def test_two_names_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "cifar/resnet8", "cifar/resnet14", *SMALL]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cifar resnet8 → cifar resnet14" in out
    assert "rows: 5 the same in both, 0 different, 0 only in the first, 3 only in the second" in out
    assert "⊕ layer1.1 BasicBlock added" in out


def test_two_files_of_weights_say_which_blocks_moved(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *files, "--spec", "cifar/resnet8", *SMALL, "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert {name for name, r in rows.items() if r["status"] != "unchanged"} == {"layer2.0"}
    assert rows["layer2.0"]["detail"]["weights"].endswith("% apart")
    assert main(["diff", "cifar/resnet8", files[1], *SMALL, "--json"]) == 0
    assert not [r for r in json.loads(capsys.readouterr().out)["rows"] if "weights" in r["detail"]], "a name has no weights to compare"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "which backbone", "--spec"]),
        (["cifar/resnet8", "cifar/resnet14", "--spec", "cifar/resnet8"], ["--spec", "belongs to a weights file"]),
        (["quickstart", "--input", "1,8,8"], ["--input", "belongs to a backbone without a spec"]),
        (["cifar/resnet8", "cifar/resnet14", "--svg", "x.png"], ["--svg: x.png would hold SVG", "Use --png"]),
        (["cifar/resnet8", "cifar/resnet9"], ["resnet9"]),
        (["gone.safetensors", "a.safetensors"], ["gone.safetensors"]),
    ],
)
def test_bad_arguments_get_one_message(
    arguments: list[str], words: list[str], files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *arguments, *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert all(word in error for word in words)
