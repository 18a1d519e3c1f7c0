"""Reading TOML: values, lines of keys, and messages about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.errors import GraphoptError, SpecError
from graphopt.spec import WeightsSpec, dumps, installed, load, loads

BACKBONE = '[backbone]\nsource = "cifar"\nname = "resnet20"\n'

#: (what the case is, TOML, what the message must contain)
MISTAKES = [
    ("no backbone", "", ["'backbone' is missing"]),
    ("not TOML", '[backbone]\nname = "a\n', ["s.toml:2:10", "line 2, column 10", "not TOML"]),
    ("a key twice", BACKBONE + "[train]\nbatch = 2\nepochs = 1\nbatch = 3\n", ["'batch' has a value already"]),
    ("not TOML at its end", BACKBONE + "a = [1,\n2", ["s.toml:5:2", "line 5, column 2"]),
    ("unknown table", BACKBONE + "[trian]\nepochs = 1\n", ["s.toml:4, trian", "unknown key 'trian'", "Did you mean 'train'"]),
    ("unknown key", BACKBONE + "[train]\n\nepoch = 3\n", ["s.toml:6, train.epoch", "unknown key 'epoch'", "Did you mean 'epochs'"]),
    ("unknown key in a sub-table", BACKBONE + "[train.optimizer]\nmomentom = 0\n", ["s.toml:5", "Did you mean 'momentum'"]),
    ("unknown key inline", BACKBONE + "[train]\noptimizer = { lrate = 1.0 }\n", ["s.toml:5, train.optimizer.lrate"]),
    ("text for a number", BACKBONE + '[train]\nepochs = "3"\n', ["s.toml:5", "expected a whole number, found the text '3'"]),
    ("true for a number", BACKBONE + "[train]\nbatch = true\n", ["expected a whole number, found true"]),
    ("a fraction for a count", BACKBONE + "[train]\nepochs = 1.5\n", ["expected a whole number, found 1.5"]),
    ("a number for a table", BACKBONE + "data = 3\n", ["backbone.data"]),
    ("a number for text", '[backbone]\nsource = "cifar"\nname = 3\n', ["s.toml:3, backbone.name", "expected text in quotes, found 3"]),
    ("out of bounds", BACKBONE + "[train]\nepochs = 0\n", ["must be more than 0, found 0"]),
    ("a word near another", BACKBONE + '[train]\namp = "bfloat"\n', ["expected 'bfloat16' or 'float16'", "Did you mean 'bfloat16'"]),
    ("unknown source", '[backbone]\nsource = "tim"\nname = "resnet50"\n', ["s.toml:2", "Did you mean 'timm'"]),
    ("unknown model", '[backbone]\nsource = "timm"\nname = "resnet5o"\n', ["s.toml:3, backbone.name", "Did you mean 'resnet50'"]),
    ("a model of the other library", '[backbone]\nsource = "torchvision"\nname = "resnet26d"\n', ['source = "timm"']),
    ("input missing for code", '[backbone]\nsource = "python"\nname = "a:b"\n', ["'input' is missing"]),
    ("an empty input", BACKBONE + "input = []\n", ["s.toml:4, backbone.input"]),
    ("too many numbers", BACKBONE + "[data.augment]\nscale = [0.1, 0.2, 0.3]\n", ["s.toml:5", "at most 2 items"]),
    ("unknown pass", BACKBONE + '[[pass]]\nuse = "freze"\n', ["s.toml:5, pass 1 (freze), use", "Did you mean 'freeze'"]),
    ("a pass without use", BACKBONE + '[[pass]]\nselect = "fc"\n', ["s.toml:4, pass 1", "'use' is missing", "freeze"]),
    ("one bracket too few", BACKBONE + '[pass]\nuse = "freeze"\n', ["s.toml:4, pass", "[[pass]]"]),
    ("a pass's unknown key", BACKBONE + '[[pass]]\nuse = "freeze"\nselct = "fc"\n', ["s.toml:6, pass 1 (freeze), selct", "'select'"]),
    ("a pass's missing key", BACKBONE + '[[pass]]\nuse = "freeze"\n', ["s.toml:4, pass 1 (freeze)", "'select' is missing"]),
    (
        "the second pass",
        BACKBONE + '[[pass]]\nuse = "freeze"\nselect = "fc"\n[[pass]]\nuse = "freeze"\nselect = "fc"\nlean = 3\n',
        ["s.toml:10, pass 2 (freeze), lean"],
    ),
    ("a trigger's key", BACKBONE + '[[pass]]\nuse = "freeze"\nselect = "fc"\nwhen = { epoch = -1 }\n', ["s.toml:7, pass 1 (freeze), when"]),
    (
        "a list in a list",
        BACKBONE + '[[pass]]\nuse = "freeze"\nselect = [["fc"]]\n',
        ["s.toml:6, pass 1 (freeze), select[0]: expected text"],
    ),
    ("code in a pass", BACKBONE + '[[pass]]\nuse = "mine.py:Mine"\n', ["s.toml:5", "Python code", "--trust"]),
]


@pytest.mark.parametrize(("text", "told"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_reported_with_location_and_fix(text: str, told: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        loads(text, file="s.toml")
    message = str(caught.value)
    for part in told:
        assert part in message, message
    assert "pydantic" not in message
    assert caught.value.exit_code == 2


def test_all_mistakes_are_reported_at_once() -> None:
    text = BACKBONE + '[train]\nepochs = "3"\nbach = 4\n[[pass]]\nuse = "freze"\n[[pass]]\nuse = "freeze"\n'
    with pytest.raises(SpecError) as caught:
        loads(text, file="s.toml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 mistakes"
    assert [any(f"s.toml:{n}," in line for line in lines) for n in (5, 6, 8, 9)] == [True] * 4


TWO_PASSES = (
    BACKBONE
    + """
[[pass]]
use = "freeze"
select = "conv1"
[[pass]]
use = "freeze"
select = "layer1"
when = { epoch = 2 }
"""
)


def test_locations_of_passes() -> None:
    spec = loads(TWO_PASSES, file="s.toml")
    assert [spec.lines["pass", 0], spec.lines["pass", 1]] == [5, 8]
    assert spec.location_of(1) == "s.toml:8"
    assert loads(dumps(spec)).location_of(0) is None


def test_specs_from_different_files_are_equal() -> None:
    one, other = loads(TWO_PASSES, file="s.toml"), loads("\n\n" + TWO_PASSES, file="t.toml")
    assert one == other
    assert hash(one) == hash(other)
    assert one.lines != other.lines
    assert one != loads(TWO_PASSES.replace("epoch = 2", "epoch = 3"))


def test_the_model_s_own_input_is_the_default() -> None:
    assert loads(BACKBONE).backbone.input == (3, 32, 32)
    assert loads(BACKBONE.replace("cifar", "timm").replace("resnet20", "inception_v3")).backbone.input == (3, 299, 299)
    assert loads(BACKBONE + "arguments = { in_chans = 1 }\n").backbone.input == (1, 32, 32)
    assert loads(BACKBONE + "input = [1, 2, 3]\n").backbone.input == (1, 2, 3)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("name=a title", ("name",), "a title"),
        ("train.optimizer.lr=0.5", ("train", "optimizer", "lr"), 0.5),
        ("train.optimizer=adamw", ("train", "optimizer", "name"), "adamw"),
        ("backbone.arguments.num_classes=7", ("backbone", "arguments", "num_classes"), 7),
        ("pass.0.when={ epoch = 5 }", ("pass", 0, "when", "epoch"), 5),
        ("data.augment.hflip=0.5", ("data", "augment", "hflip"), 0.5),
    ],
)
def test_overrides(override: str, path: tuple[str | int, ...], value: object) -> None:
    text = BACKBONE + '[[pass]]\nuse = "freeze"\nselect = "fc"\n[train]\noptimizer = "sgd"\n'
    found: object = loads(text, overrides=[override]).resolved()
    for part in path:
        found = found[part]  # type: ignore[index]
    assert found == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epochs", "key.path=value"),
        ("=3", "key.path=value"),
        ("name.first=3", "name"),
        ("pass.7.use=3", "no key 'pass.7.use'"),
        ("pass.x.use=3", "no key"),
        ("train.epoch=3", "Did you mean 'epochs'"),
        ("train.epochs=x", "expected a whole number, found the text 'x'"),
    ],
)
def test_overrides_that_do_not_fit(override: str, told: str) -> None:
    with pytest.raises(SpecError, match=told) as caught:
        loads(BACKBONE + "[train]\nepochs = 3\n", file="s.toml", overrides=[override])
    assert "--set" in str(caught.value) or override == "name.first=3"


def test_a_file_a_folder_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.toml").write_text(BACKBONE)
    monkeypatch.chdir(tmp_path)
    assert load("run") == load("run/spec.toml") == load(tmp_path / "run")
    assert load("run").where() == "run/spec.toml"
    assert load("quickstart") == load(installed()["quickstart"])


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("quikstart", "quickstart"),
        ("quikstart.toml", "quickstart"),
        ("nowhere/at/all.toml", "graphopt specs"),
        (".", "without a spec.toml"),
    ],
)
def test_what_is_not_there(argument: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=told) as caught:
        load(argument)
    assert argument in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="UTF-8"):
        load(tmp_path / "s.toml")


def test_files_are_looked_for_in_the_folder_of_the_spec(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "s.toml").write_text(BACKBONE + 'weights = "w.safetensors"\n')
    assert load(tmp_path / "s.toml").backbone.weights == str(tmp_path / "w.safetensors")
    (tmp_path / "s.toml").write_text(BACKBONE + 'weights = "elsewhere.safetensors"\n')
    assert load(tmp_path / "s.toml").backbone.weights == "elsewhere.safetensors"


PASS_FILE = """
from graphopt import Effects, Match, Pass

class Mine(Pass):
    name = "mine"
    strength: int = 1

    def match(self, graph):
        return Match(())

    def rewrite(self, edit, match):
        return Effects()
"""


def test_a_pass_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(PASS_FILE)
    (tmp_path / "s.toml").write_text(BACKBONE + '[[pass]]\nuse = "mine.py:Mine"\nstrength = 2\n')
    with pytest.raises(SpecError, match="--trust"):
        load(tmp_path / "s.toml")
    spec = load(tmp_path / "s.toml", trust=True)
    assert spec.passes[0].strength == 2  # type: ignore[attr-defined]  # the option of a pass that the test wrote
    # The resolved spec finds the file from any folder.
    monkeypatch.chdir("/")
    assert loads(dumps(spec), trust=True) == spec


@pytest.mark.parametrize(
    ("use", "told"),
    [
        ("gone.py:Mine", "no file"),
        ("mine.py:Other", "mine.py has no 'Other'"),
        ("broken.py:Mine", "ZeroDivisionError"),
        ("a_package.that_is_not:Mine", "no Python module 'a_package.that_is_not'"),
        ("mine.py:", "is not package.module:name or file.py:name"),
    ],
)
def test_a_pass_by_file_that_is_not_one(use: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PASS_FILE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "s.toml").write_text(BACKBONE + f'[[pass]]\nuse = "{use}"\n')
    with pytest.raises(GraphoptError, match=told):
        load(tmp_path / "s.toml", trust=True)


@pytest.mark.parametrize("name", sorted(installed()))
def test_installed_specs_are_sound(name: str) -> None:
    spec = load(name)
    assert spec.name
    assert loads(dumps(spec)) == spec


def test_a_pass_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_as_a_module.py").write_text(PASS_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = BACKBONE + '[[pass]]\nuse = "mine_as_a_module:Mine"\nstrength = 2\n'
    with pytest.raises(SpecError, match="--trust"):
        loads(text)
    spec = loads(text, trust=True)
    assert spec.passes[0].strength == 2  # type: ignore[attr-defined]  # the option of a pass that the test wrote
    assert loads(dumps(spec), trust=True) == spec


def test_a_backbone_by_file_is_found_from_the_spec_s_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    (tmp_path / "s.toml").write_text('[backbone]\nsource = "python"\nname = "net.py:make"\ninput = [3, 8, 8]\n')
    assert load(tmp_path / "s.toml").backbone.name == f"{tmp_path / 'net.py'}:make"


def test_weights_in_part(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "s.toml").write_text(BACKBONE + 'weights = { file = "w.safetensors", reset = ["fc"] }\n')
    spec = load(tmp_path / "s.toml")
    assert spec.backbone.weights == WeightsSpec(file=str(tmp_path / "w.safetensors"), reset=("fc",))
    assert loads(dumps(spec)) == spec
    with pytest.raises(SpecError, match="Did you mean 'reset'"):
        load(tmp_path / "s.toml", overrides=["backbone.weights.resets=[]"])
