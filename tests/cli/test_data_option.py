"""--data: the folder of the images, and the data set's name where the spec has another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.cli import main
from graphopt.spec import load
from tests.data import formats

RUN = ["train", "s.toml", "-o", "run", "-q", "--set", "train.epochs=1", "--set", "backbone.input=[1, 8, 8]"]


def test_a_data_set_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    formats.idx(Path("images"), "MNIST", count=40)
    assert main([*RUN, "--data", "mnist=images"]) == 0, capsys.readouterr().err
    data = load("run").data
    assert (data.name, data.root) == ("mnist", str(Path("images").resolve()))
    assert main(["eval", "run", "--data", "images", "--json"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["data"] == "mnist"


def test_a_spec_of_digits_takes_a_folder_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    formats.folders(Path("images"), classes=3, count=8)
    assert main([*RUN, "--data", "images"]) == 0, capsys.readouterr().err
    assert load("run").data.name == "folder"


def test_check_takes_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "s.toml", "--data", "cifar10=nowhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err
