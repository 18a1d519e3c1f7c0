"""`graphopt eval`: a run, an exported file and a spec are scored alike."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from graphopt.cli import main
from graphopt.train.export import load_run

KEEP = ("--set", "train.keep=4")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", "s.toml", "-o", "run", "-q", *KEEP]) == 0
    capsys.readouterr()
    return Path("run")


def scores(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status = main(["eval", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_a_run_scores_what_it_measured_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if record["kind"] == "epoch"]
    for epoch in (0, 1):
        found = scores(capsys, "run", "--epoch", str(epoch))
        for figure in ("accuracy", "top5_accuracy", "loss"):
            assert found[figure] == pytest.approx(measured[epoch][figure], rel=1e-6), (epoch, figure)
    assert found["samples"] == 20
    assert found["images_per_second"] > 0
    assert found["accuracy"] <= found["top5_accuracy"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["top5_accuracy"] == measured[-1]["top5_accuracy"]
    assert scores(capsys, "run")["accuracy"] == pytest.approx(summary["best_accuracy"])
    assert scores(capsys, "run/last.pt")["accuracy"] == pytest.approx(summary["accuracy"])


def test_an_exported_file_scores_as_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "-o", "m.safetensors"]) == 0
    capsys.readouterr()
    found, expected = scores(capsys, "m.safetensors", "--spec", "s.toml", "--batch", "7"), scores(capsys, "run")
    assert found["network_images_per_second"] > 0
    for figure in ("accuracy", "top5_accuracy", "loss"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-5)


def test_the_confusion_matrix(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores(capsys, "run", "--confusion", "c.csv", "--split", "train", "--set", "data.eval_limit=40")
    counts = torch.tensor(found["confusion"])
    assert counts.shape == (10, 10)
    assert counts.sum() == 40
    assert counts.trace() / 40 == pytest.approx(found["accuracy"])
    rows = [line.split(",") for line in Path("c.csv").read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == found["classes"]
    assert [list(map(int, row[1:])) for row in rows[1:]] == found["confusion"]
    assert main(["eval", "run", "--confusion", "-"]) == 0
    assert "class \\ predicted" in capsys.readouterr().out
    scores(capsys, "run", "--confusion", "c.json")
    assert json.loads(Path("c.json").read_text()).keys() == {"classes", "counts"}


def test_a_spec_s_backbone_is_scored_with_its_weights_or_as_initialised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "s.toml"]) == 0
    out, err = capsys.readouterr()
    assert "accuracy, top-5" in out
    assert "as it was initialised" in err


def test_a_plan_in_a_file_brings_its_spec(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import graphopt

    graphopt.save(load_run(run), "plan.safetensors")
    assert scores(capsys, "plan.safetensors")["loss"] == pytest.approx(scores(capsys, "run")["loss"], rel=1e-5)


def test_a_run_that_has_lost_files_is_still_that_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    loss = scores(capsys, "run")["loss"]
    (run / "spec.toml").write_text((spec := (run / "spec.toml").read_text()) + "# changed\n")
    assert "run/spec.toml: is not what the run was trained with" in said("eval", "run")
    (run / "spec.toml").write_text(spec)
    (run / "run.json").unlink()
    assert scores(capsys, "run")["loss"] == loss, "not that of the backbone as it was initialised"
    for command in ("diff", "check", "report", "compare"):
        assert "run: the run has lost its run.json. Resume the run, which writes it anew" in said(command, "run")
    (run / "run.json").touch()
    (run / "spec.toml").unlink()
    assert "run: a folder without a spec.toml. Restore it: `graphopt train SPEC -o run --resume`" in said("eval", "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--epoch", "9"], "keeps no checkpoint of the end of epoch 9. There are those of epoch 0, 1"),
        (["s.toml", "--epoch", "0"], "--epoch: only the folder of a run has epochs"),
        (["runs/none"], "runs/none: no such run, weights file or spec"),
        (["w.safetensors"], "does not say which backbone and data it belongs to. Name the spec"),
        (["s.toml", "--spec", "s.toml"], "--spec: belongs to a weights file"),
        (["s.toml", "--split", "night", "--confusion", "no/c.csv"], "no/c.csv: its folder does not exist"),
        (["s.toml", "--split", "night"], "digits has no split 'night'"),
        (["s.toml", "--data", "."], "folder (validation) is missing or damaged under"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) and len(value) > 1 else None,
)
def test_what_cannot_be_scored(
    arguments: list[str], message: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "run":
        request.getfixturevalue("run")
    Path("w.safetensors").touch()
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_of_classes_that_are_no_utf_8_are_written() -> None:
    for split in ("train", "val"):
        for name in (b"a", b"\xff"):
            folder = Path(f"images/{split}", os.fsdecode(name))
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    assert main(["eval", "s.toml", "--data", "folder=images", "--set", "train.batch=1", "--confusion", "c.csv"]) == 0
    assert rb"\udcff" in Path("c.csv").read_bytes()
