"""Values that no run can mean are mistakes of the spec, reported at their line."""

import math
import time

import pytest

from graphopt.data.datasets import open_split
from graphopt.errors import RunError, SpecError, WeightsError
from graphopt.models.weights import read_weights
from graphopt.spec import DataSpec, Spec, load, loads
from graphopt.spec.reading import MOST_TEXT

BACKBONE = '[backbone]\nsource = "cifar"\nname = "resnet20"\n'


def refused(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        loads(text, file="s.toml")
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        *("train.seed = 18446744073709551616", "train.optimizer.lr = 1e308", "train.optimizer.lr = inf", "train.optimizer.lr = nan"),
        *("train.optimizer.weight_decay = inf", "train.clip = inf", "train.batch = 4611686018427387904", "train.epochs = 1e9"),
        *("train.scheduler.warmup_epochs = 1" + 400 * "0", "train.scheduler.warmup_lr = inf", "train.scheduler.min_lr = inf"),
        *("train.scheduler.decay_rate = inf", "train.scheduler.decay_rate = 1e300", "train.accumulate = 1e30"),
        *("data.std = [0.0]", "data.std = [-1.0]", "data.std = [nan]", "data.std = [inf]", "data.std = [1e-320]", "data.std = []"),
        *("data.mean = []", "data.mean = [nan]", "data.mean = [inf]", "data.crop_pct = 1e-320", "data.crop_pct = 0.001"),
        *("data.workers = 1000000", "data.augment.color_jitter = inf", "data.augment.scale = [nan, nan]"),
        *("data.augment.ratio = [-1.0, -1.0]", "data.augment.ratio = [0.0, 0.0]", "data.augment.scale = [0.9, 0.1]"),
        *("data.augment.mixup = inf", "data.augment.mixup = 1e-320", 'data.augment.auto_augment = "rand-n1000000"'),
        *("backbone.input = [1, 2147483647, 16]", "backbone.input = [3, 1000000, 1000000]", "backbone.input = [1, 1" + 30 * "0" + ", 32]"),
    ],
)
def test_a_value_out_of_reason_is_reported_at_its_line(setting: str) -> None:
    field, _, value = setting.partition(" = ")
    table, _, key = field.rpartition(".")
    text = f"{BACKBONE}{key} = {value}\n" if table == "backbone" else f"{BACKBONE}[{table}]\n{key} = {value}\n"
    assert f"s.toml:{4 if table == 'backbone' else 5}, {field}" in refused(text)


@pytest.mark.parametrize(
    "option",
    [
        'when = { score = "change", below = true }',
        'when = { score = "change", below = inf }',
        'when = { score = "change", below = "0.1" }',
        'when = { schedule = "freezeout", t0 = nan }',
        "lean = 1",
        'lean = "yes"',
        "select = { blocks = 1 }",
    ],
)
def test_options_of_passes_are_not_converted(option: str) -> None:
    select = "" if option.startswith("select") else 'select = "fc"\n'
    assert "pass 1 (freeze)" in refused(f'{BACKBONE}[[pass]]\nuse = "freeze"\n{select}{option}\n')


def test_reasonable_extremes_are_kept() -> None:
    assert DataSpec(std=(0.001,), mean=(0.0,)).std == (0.001,)
    spec = loads(BACKBONE + "[train]\nepochs = 1_000_000_000\nseed = 9223372036854775807\n[train.optimizer]\nlr = 1e30\n")
    assert (spec.train.epochs, spec.train.seed, spec.train.optimizer.lr) == (10**9, 2**63 - 1, 1e30)


@pytest.mark.parametrize(
    "value",
    [
        "clip = " + 900 * "[" + 900 * "]",
        "clip = " + 100_000 * "[" + 100_000 * "]",
        "clip = " + 2000 * "{ a = " + "1" + 2000 * " }",
        ".".join(2000 * ["a"]) + " = 1",
        ".".join(50_000 * ["a"]) + " = 1",
        "clip = " + 100 * "[" + 100 * "]",
    ],
    ids=["arrays", "many arrays", "tables", "dotted", "long dotted", "some"],
)
def test_deep_nesting_is_a_mistake(value: str) -> None:
    started = time.process_time()
    assert "nested" in refused(f"{BACKBONE}[train]\n{value}\n")
    assert time.process_time() - started < 5


def test_an_override_may_nest_no_deeper() -> None:
    with pytest.raises(SpecError, match="nested"):
        loads(BACKBONE, overrides=["train.clip=" + 5000 * "[" + 5000 * "]"])


def test_reading_is_linear() -> None:
    """An array of 8,000 lines, 8,000 comments and a string of 8,000 lines take less than half a second."""
    lines = "".join(f'  "layer{i}", # {i}\n' for i in range(8_000))
    text = f'{BACKBONE}[backbone.arguments]\na = [\n{lines}]\nb = """\n{lines}"""\n' + 8_000 * "# a comment\n"
    started = time.process_time()
    spec = loads(text)
    assert time.process_time() - started < 10
    assert spec.lines["backbone", "arguments", "a", 7_999] == 8_005
    assert spec.lines["backbone", "arguments", "b"] == 8_007


@pytest.mark.parametrize("key", ["weights", "root"])
def test_a_path_longer_than_the_system_allows_is_only_not_there(key: str) -> None:
    name = "x" * 5000
    spec = loads(f'{BACKBONE}{key} = "{name}"\n' if key == "weights" else f'{BACKBONE}[data]\nroot = "{name}"\n')
    assert name in (spec.backbone.weights, spec.data.root)


def test_a_pass_in_a_file_with_a_long_name_is_not_there() -> None:
    with pytest.raises(SpecError, match="no file"):
        loads(f'{BACKBONE}[[pass]]\nuse = "{5000 * "x"}.py:Mine"\n', trust=True)


def test_thousands_of_passes_are_a_mistake() -> None:
    text = BACKBONE + 10_000 * '[[pass]]\nuse = "checkpoint"\nselect = "layer1"\n'
    started = time.process_time()
    assert "at most 100" in refused(text)
    assert time.process_time() - started < 10


def test_no_number_of_the_spec_may_be_infinite() -> None:
    for path, value in _numbers(loads(BACKBONE).resolved()):
        for wrong in ("inf", "-inf", "nan"):
            *tables, key = path
            if isinstance(value, float) and tables[:1] != ["pass"]:
                assert key in refused(f"{BACKBONE}[{'.'.join(tables)}]\n{key} = {wrong}\n")
    assert math.isinf(loads(BACKBONE + "arguments = { a = inf }\n").backbone.arguments["a"])
    assert isinstance(loads(BACKBONE), Spec)


def _numbers(table: dict, path: tuple[str, ...] = ()):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-that-name/w.safetensors", "a\0b"])
def test_files_that_cannot_be_there_are_errors_of_their_own_kind(path: str) -> None:
    with pytest.raises(WeightsError, match="no such weights file"):
        read_weights(path)
    with pytest.raises(RunError, match="there is no folder"):
        open_split("folder", path, "train")
    with pytest.raises(SpecError, match="no such spec file"):
        load(path)


#: the largest text that is read, of each kind that takes long, and the message about it
LARGE = {
    "over": (lambda room: "#" * (room + 1), "at most 500,000 characters, this one has 500,001"),
    "unknown keys": (lambda room: "[train]\n" + "".join(f"k{i:05}=1\n" for i in range(room // 10)), "more like these"),
    "a long name": (lambda room: f'[[pass]]\nuse = "{"r" * (room - 20)}"\n', "unknown pass"),
    "a long key": (lambda room: f"[train]\n{'r' * (room - 20)} = 1\n", "unknown key"),
    "wrong items": (lambda room: f"[data]\nmean = [{'true,' * (room // 5 - 10)}]\n", "more like these"),
    "items": (lambda room: f"[data]\nmean = [{'1,' * (room // 2 - 10)}]\n", "at most 8 items"),
}


@pytest.mark.parametrize("what", LARGE)
def test_the_largest_texts_are_mistakes_within_seconds_of_processor_time(what: str) -> None:
    """A second or less on an ordinary machine."""
    make, message = LARGE[what]
    text = BACKBONE + make(MOST_TEXT - len(BACKBONE))
    started = time.process_time()
    assert message in refused(text)
    assert time.process_time() - started < 10
