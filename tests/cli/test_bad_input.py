"""Bad input: exit status 2, one message, no traceback, no partial files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli import main
from tests.cli.spec import SPEC


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; its one message."""
    status = main(list(arguments))
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.count("error: ") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    return err


WEIGHTS = 'weights = "w.safetensors"\n'

#: (what the case is, the spec as (old, new) or None, command, what the message must contain)
CASES = [
    ("file missing", None, ["apply", "gone.toml"], ["gone.toml", "no such spec file"]),
    ("installed spec misspelt", None, ["train", "quikstart"], ["Did you mean 'quickstart'"]),
    ("not TOML", ('name = "small"', 'name = "small'), ["apply", "s.toml"], ["s.toml:1:", "line 1, column"]),
    ("unknown key", ("epochs", "epoch"), ["check", "s.toml"], ["s.toml:14, train.epoch", "Did you mean 'epochs'"]),
    ("wrong type", ("epochs = 2", 'epochs = "2"'), ["apply", "s.toml"], ["s.toml:14", "expected a whole number"]),
    ("unknown backbone", ('"cifar"\nname = "resnet8"', '"timm"\nname = "resnet5o"'), ["check", "s.toml"], ["s.toml:4", "'resnet50'"]),
    ("bad depth", ("resnet8", "resnet9"), ["check", "s.toml"], ["s.toml:4, backbone.name", "6n+2"]),
    ("unknown argument", ("in_chans", "inchans"), ["check", "s.toml"], ["s.toml:", "Did you mean 'in_chans'", "num_classes"]),
    ("empty selector", ('["conv1", "bn1"]', "[]"), ["check", "s.toml"], ["s.toml:9", "select"]),
    ("selector without a match", ('"bn1"', '"layer1.7"'), ["check", "s.toml"], ["s.toml:7", "layer1.7", "layer1.0"]),
    ("selector filters nothing", ('["conv1", "bn1"]', '{ type = "LSTM" }'), ["apply", "s.toml"], ["s.toml:7", "LSTM"]),
    ("input the backbone cannot take", ("[1, 8, 8]", "[3, 8, 8]"), ["apply", "s.toml"], ["s.toml:6, backbone.input", "(N, 3, 8, 8)"]),
    ("input of another rank", ("[1, 8, 8]", "[8]"), ["check", "s.toml"], ["s.toml:6, backbone.input"]),
    ("backbone in code", ('"cifar"\nname = "resnet8"', '"python"\nname = "a.b:c"'), ["apply", "s.toml"], ["s.toml:4", "--trust"]),
    ("pass in code", ('"freeze"', '"mine.py:Mine"'), ["train", "s.toml"], ["s.toml:8", "--trust"]),
    ("weights missing", ("[[pass]]", f"{WEIGHTS}[[pass]]"), ["apply", "s.toml"], ["s.toml:7, backbone.weights", "no such weights file"]),
    ("weights as argument", ("in_chans = 1", "pretrained = true"), ["check", "s.toml"], ["s.toml:4, backbone.name", "would download"]),
    ("unknown data set", ("[data]", '[data]\nname = "digit"'), ["train", "s.toml", "-o", "run"], ["digits"]),
    ("override without value", None, ["apply", "s.toml", "--set", "train.epochs"], ["key.path=value"]),
    ("override of another type", None, ["apply", "s.toml", "--set", "train.epochs=x"], ["--set train.epochs", "whole number"]),
    ("unknown level", None, ["apply", "s.toml", "--verify", "much"], ["full, fast or off"]),
    ("epoch beyond the run", None, ["apply", "s.toml", "--epoch", "2"], ["0 to 1"]),
    ("no such run", None, ["export", "nowhere", "-o", "m.safetensors"], ["nowhere"]),
    ("no such device", None, ["check", "s.toml", "--device", "tpu9"], ["--device: no device is called 'tpu9'. Known are A100, H100"]),
    ("not a run", None, ["export", ".", "-o", "m.safetensors"], ["checkpoint"]),
    ("unknown pass", None, ["passes", "freez"], ["Did you mean 'freeze'"]),
    ("unknown installed spec", None, ["specs", "quick"], ["quickstart"]),
    ("not source/name", None, ["inspect", "tim/resnet50"], ["Did you mean 'timm'"]),
    ("no source", None, ["inspect", "resnet50"], ["'resnet50' is not source/name", "torchvision/resnet50 or timm/resnet50"]),
    (
        "no checkpoint",
        None,
        ["export", "s.toml", "-o", "m.safetensors"],
        ["not a checkpoint. Name the folder of a run"],
    ),
    ("unknown name to inspect", None, ["inspect", "timm/resnet5o"], ["'resnet50'"]),
    ("shape that is none", None, ["inspect", "cifar/resnet20", "--input", "3,a"], ["--input", "3,224,224"]),
    (
        "shape beyond memory",
        None,
        ["inspect", "cifar/resnet8", "--input", "1,99999,99999"],
        ["cifar/resnet8, input", "one sample of shape"],
    ),
    ("a file for a module", None, ["inspect", "python/my/net.py:f", "--input", "3,3,3", "--trust"], ["my/net.py", "no file"]),
    ("folder missing for the schema", None, ["schema", "-o", "gone/s.json"], ["gone"]),
]


@pytest.mark.parametrize(("change", "command", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_message_and_exit_2(
    change: tuple[str, str] | None, command: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    if change:
        assert change[0] in SPEC
        Path("s.toml").write_text(SPEC.replace(*change, 1))
    message = refused(capsys, *command)
    for part in parts:
        assert part in message, message
    assert os.listdir(folder) == ["s.toml"]


@pytest.mark.parametrize(
    ("old", "new", "location"),
    [("[[pass]]", f"{WEIGHTS}[[pass]]", "s.toml:7, backbone.weights"), ("[1, 8, 8]", "[3, 8, 8]", "s.toml:6, backbone.input")],
    ids=["weights missing", "input the backbone cannot take"],
)
def test_a_run_locates_its_backbone_once(old: str, new: str, location: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(SPEC.replace(old, new, 1))
    assert refused(capsys, "train", "s.toml", "-o", "run").count(location) == 1


#: what the case is, the spec as (old, new), what the message must contain
REFUSED = [
    ("optimizer", ("[train]", '[train]\noptimizer = { name = "admw" }'), ["train.optimizer", "'admw'", "Did you mean 'adamw'"]),
    ("its option", ("[train]", "[train]\noptimizer = { arguments = { betaz = 7 } }"), ["train.optimizer", "betaz"]),
    ("scheduler's option", ("[train]", "[train]\nscheduler = { arguments = { cycle = 7 } }"), ["train.scheduler", "cycle"]),
    ("layers", ("[train]", "[train]\noptimizer = { layer_decay = 0.5 }"), ["train.optimizer.layer_decay", "does not define its layers"]),
    ("classes", ("in_chans = 1", "in_chans = 1, num_classes = 7"), ["7 classes, the data has 10", "Set num_classes = 10"]),
    ("data folder", ("[data]", '[data]\nname = "cifar10"\nroot = "gone"'), ["data.root", "there is no folder", "cifar-10-batches-py"]),
    ("no data folder", ("[data]", '[data]\nname = "folder"'), ["data.root", "needs a folder"]),
    ("data set", ("[data]", '[data]\nname = "digit"'), ["data.name", "Did you mean 'digits'"]),
    ("batch", ("batch = 20", "batch = 41"), ["train.batch", "takes 41 images, the training set has 40"]),
    ("device", ("[train]", '[train]\ndevice = "cuda:77"'), ["train.device", "no device cuda:77"]),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_the_dry_run_refuses_what_training_refuses(change: tuple[str, str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(SPEC.replace(*change))
    message = refused(capsys, "check", "s.toml")
    assert all(word in message for word in words), message
    assert refused(capsys, "train", "s.toml", "-o", "run") == message
    assert not Path("run").exists()


def test_the_dry_run_says_where_its_counts_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "s.toml"]) == 0
    assert "run of 2 epochs of 40 images:" in capsys.readouterr().out
    Path("s.toml").write_text(SPEC.replace("[data]\n", '[data]\nname = "cifar10"\nroot = "gone"\n').replace("train_limit = 40\n", ""))
    assert main(["check", "s.toml"]) == 2
    assert "run of 2 epochs of 50,000 images, as published:" in capsys.readouterr().out


def test_the_dry_run_reports_all_that_training_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(SPEC.replace("batch = 20", 'batch = 41\noptimizer = { name = "admw" }'))
    assert main(["check", "s.toml", "--json"]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in json.loads(out)["refused"]] == ["train.batch", "train.optimizer"]
    assert err.count("error: ") == 2


def test_passes_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    claims = 'use = "freeze"\nselect = "layer1.0"\n[[pass]]\nuse = "drop"\nupto = "layer1"\n'
    Path("s.toml").write_text(SPEC.replace('use = "freeze"\n', claims + '[[pass]]\nuse = "freeze"\n'))
    message = refused(capsys, "check", "s.toml")
    assert "s.toml:" in message


@pytest.mark.parametrize("kind", ["file", "folder", "run"])
def test_an_output_folder_that_is_not_ours(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("out")
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("thesis.tex" if kind == "folder" else "run.json")).write_text("mine")
    before = {path: path.read_text() for path in [out, *out.glob("*")] if path.is_file()}
    assert "out" in refused(capsys, "apply", "s.toml", "-o", "out")
    assert {path: path.read_text() for path in [out, *out.glob("*")] if path.is_file()} == before
    if kind == "folder":
        assert "not a run" in refused(capsys, "train", "s.toml", "-o", "out")


def test_a_folder_whose_names_are_ours_but_not_its_content(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/spec.toml").write_text("mine")
    refused(capsys, "apply", "s.toml", "-o", "out")
    assert Path("out/spec.toml").read_text() == "mine"


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    existing: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    if existing:
        assert main(["apply", "s.toml", "-o", "out"]) == 0
        capsys.readouterr()
    before = {path.name: path.read_text() for path in Path("out").glob("*")}
    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in refused(capsys, "apply", "s.toml", "-o", "out", "--set", "train.epochs=1")
    assert {path.name: path.read_text() for path in Path("out").glob("*")} == before
    assert sorted(os.listdir(folder)) == (["out", "s.toml"] if existing else ["s.toml"])


def test_a_full_disk_in_the_schema(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in refused(capsys, "schema", "-o", "s.json")
    assert os.listdir(folder) == ["s.toml"]


def test_a_checkpoint_of_another_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "s.toml", "-o", "run", "-q", "--set", "train.epochs=1"]) == 0
    capsys.readouterr()
    weights = Path("run/last.pt").read_bytes()
    assert "--resume" in refused(capsys, "train", "s.toml", "-o", "run")
    other = ["train", "s.toml", "-o", "run", "--resume", "--set", "backbone.arguments.num_classes=10", "--set", "pass.0.select=layer1"]
    assert "another spec" in refused(capsys, *other)
    assert Path("run/last.pt").read_bytes() == weights


def test_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "gone.toml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_in_graphopt_is_1_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("graphopt.spec.load", broken)
    assert main(["apply", "s.toml"]) == 1
    err = capsys.readouterr().err
    assert "by nought" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_a_folder_for_features_needs_trust(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    drop = f'use = "drop"\nupto = "layer1"\ncache = "disk"\nfolder = "{folder / "elsewhere" / "features"}"'
    Path("s.toml").write_text(SPEC.replace('use = "freeze"\nselect = ["conv1", "bn1"]', drop))
    for command in (["check", "s.toml"], ["train", "s.toml", "-o", "run"]):
        message = refused(capsys, *command)
        assert "s.toml:7 (pass 1, drop)" in message
        assert "--trust" in message
    assert not (folder / "elsewhere").exists()
    assert main(["check", "s.toml", "--trust"]) == 0


def test_check_and_train_refuse_a_later_phase_alike(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    passes = 'use = "supervise"\nmodules = 2\n[[pass]]\nuse = "drop"\nupto = "layer1"\nwhen = { epoch = 1 }'
    Path("s.toml").write_text(SPEC.replace('use = "freeze"\nselect = ["conv1", "bn1"]', passes))
    messages = [refused(capsys, *command) for command in (["check", "s.toml"], ["train", "s.toml", "-o", "run"])]
    assert messages[0] == messages[1]
    assert "s.toml:10 (pass 2, drop)" in messages[0]
    assert "from epoch 1 on" in messages[0]


def test_check_and_train_refuse_features_that_cannot_be_cached_alike(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    augmented = (
        SPEC.replace('use = "freeze"\nselect = ["conv1", "bn1"]', 'use = "drop"\nupto = "layer1"\ncache = "disk"')
        + "[data.augment]\nhflip = 0.5\n"
    )
    Path("s.toml").write_text(augmented)
    messages = [refused(capsys, *command) for command in (["check", "s.toml"], ["train", "s.toml", "-o", "run"])]
    assert messages[0] == messages[1]
    assert "random augmentation" in messages[0]
    assert os.listdir(folder) == ["s.toml"]


def test_a_spec_without_verification_is_checked_without_comparison(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("graphopt.tracing.MOST_BYTES", 1000)
    assert 'verify = "off"' in refused(capsys, "check", "s.toml")
    assert main(["check", "s.toml", "--set", "verify=off"]) == 0


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ('optimizer = { name = "adamw", arguments = { betas = [0.3] } }', "adamw could not be built"),
        ('optimizer = { name = "adamw", arguments = { eps = "x" } }', "adamw could not be built"),
        (
            'optimizer = { name = "adamw", arguments = { amsgrad = [], maximize = {}, foreach = 3, betas = ["a", "b"] } }',
            "adamw could not be",
        ),
        ('optimizer = { name = "momentum", arguments = { dampening = "x" } }', "momentum cannot step with these arguments"),
        ("scheduler = { arguments = { cycle_mul = 0.0, cycle_limit = 5, cycle_decay = 0.5 } }", "train.scheduler"),
        ('scheduler = { name = "step", decay_epochs = 0.001, decay_rate = 100.0 }', "train.scheduler"),
    ],
)
def test_settings_that_a_step_would_fail_on_are_found_before_it(
    setting: str, part: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    Path("s.toml").write_text(SPEC.replace("batch = 20", f"batch = 20\n{setting}"))
    for command in (["check", "s.toml"], ["train", "s.toml", "-o", "run"]):
        assert part in refused(capsys, *command)
    assert os.listdir(folder) == ["s.toml"]
