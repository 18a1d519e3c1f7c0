"""TOML out: any spec, written and read again, is the same spec."""

import json
import math
from typing import Any

import pytest
import tomli
from hypothesis import example, given
from hypothesis import strategies as st

from graphopt.compiler.pass_base import Pass
from graphopt.compiler.registry import passes
from graphopt.ir.selector import Selector
from graphopt.spec import dumps, from_table, installed, load, loads, schema
from graphopt.spec.writing import kind_of, option_texts, toml_value

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), words)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=6
)
arguments = st.dictionaries(words, values, max_size=6)
fractions = st.floats(0, 1)
epochs = st.integers(0, 500)
selectors = st.one_of(
    words.filter(bool),
    st.lists(words.filter(bool), min_size=1, max_size=3),
    st.builds(lambda first, path: {"path": path, "first": first}, st.integers(1, 9), words.filter(bool)),
)
triggers = st.one_of(
    st.just("start"),
    st.builds(lambda epoch: {"epoch": epoch}, epochs),
    st.builds(lambda epoch, more: {"epoch": epoch, "until": epoch + more}, epochs, st.integers(1, 50)),
)


def _table(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


freezes = _table({"use": st.just("freeze"), "select": selectors}, {"when": triggers, "lean": st.booleans()})
specs = _table(
    {
        "backbone": _table(
            {"source": st.just("python"), "name": words.filter(bool)},
            {"arguments": arguments, "weights": words},
        ).flatmap(lambda table: st.lists(st.integers(1, 64), min_size=1, max_size=4).map(lambda shape: {**table, "input": shape}))
    },
    {
        "name": words,
        "verify": st.sampled_from(["full", "fast", "off"]),
        "pass": st.lists(freezes, max_size=3),
        "data": _table(
            {},
            {
                "name": words,
                "mean": st.lists(fractions, min_size=1, max_size=3),
                "workers": st.integers(0, 8),
                "augment": _table(
                    {},
                    {"hflip": fractions, "scale": st.lists(st.floats(0.001, 1), min_size=2, max_size=2).map(sorted), "auto_augment": words},
                ),
            },
        ),
        "train": _table(
            {},
            {
                "epochs": st.integers(1, 999),
                "optimizer": st.one_of(words, _table({}, {"lr": st.floats(1e-9, 10), "arguments": arguments})),
                "scheduler": st.one_of(st.sampled_from(["cosine", "step"]), _table({}, {"warmup_epochs": epochs, "min_lr": fractions})),
                "ema": st.floats(0.1, 0.9999),
            },
        ),
    },
)


@given(specs)
@example({"backbone": {"source": "cifar", "name": "resnet20", "input": [1]}, "train": {"optimizer": {"arguments": {"a": [math.inf]}}}})
def test_written_and_read_it_is_the_same_spec(table: dict[str, Any]) -> None:
    spec = from_table(table)
    text = dumps(spec)
    again = loads(text)
    assert again == spec
    assert again.digest == spec.digest
    assert dumps(again) == text


def test_the_resolved_quickstart_reads_well() -> None:
    text = dumps(load("quickstart"))
    assert text.startswith('name = "quickstart')
    assert '\n[[pass]]\nuse = "freeze"\n' in text
    assert "when = { epoch = 4 }" in text
    assert "\n[train.optimizer]\n" in text
    assert tomli.loads(text)["train"]["epochs"] == 8


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("train.epochs=3", True),
        ("name=other", True),
        ("data.name=cifar10", True),
        ("backbone.weights=w.safetensors", True),
        ("verify=off", True),
        ("backbone.name=resnet32", False),
        ("backbone.input=[1, 32, 32]", False),
        ("backbone.arguments.num_classes=3", False),
        ("pass.0.when.epoch=5", False),
        ("pass.0.select=conv1", False),
    ],
)
def test_the_digest_is_of_structure(override: str, same: bool) -> None:
    assert (load("quickstart", overrides=[override]).digest == load("quickstart").digest) is same


def test_the_digest_does_not_depend_on_the_process() -> None:
    # Written down: checkpoints carry it.
    assert load("quickstart").digest == load("quickstart").digest
    assert len(load("quickstart").digest) == 16


def test_schema() -> None:
    made = schema()
    json.dumps(made)
    uses = [branch["properties"]["use"].get("const") for branch in made["properties"]["pass"]["items"]["anyOf"]]
    assert "freeze" in uses
    assert made["additionalProperties"] is False
    known = made["properties"].keys()
    for name in installed():
        assert tomli.loads(installed()[name].read_text()).keys() <= known


def test_every_key_and_every_option_has_a_text_and_a_default_that_can_be_pasted() -> None:
    for name, cls in passes().items():
        assert set(option_texts(cls)) == set(cls.model_fields), name
        for option, field in cls.model_fields.items():
            if not field.is_required() and option != "when" and field.default is not None:
                tomli.loads(f"{option} = {toml_value(field.default)}")
    whole = schema()
    branches = whole["properties"]["pass"]["items"]["anyOf"]
    for table in (whole, *branches, *whole["$defs"].values()):
        for key, value in table.get("properties", {}).items():
            assert "description" in value or key in ("use", "pass", *whole["properties"]), (table.get("title"), key)


def test_an_option_without_a_text_shows_what_it_takes() -> None:
    class Plain(Pass):
        select: Selector
        factor: float = 0.5
        names: tuple[str, ...] | None = None

    kinds = [kind_of(Plain, option) for option in ("select", "factor", "names")]
    assert kinds == ["text or an array or a table", "a number", "an array"]
    assert option_texts(Plain).keys() == {"when"}
