"""The line of every key, in TOML 1.1 as people and as our writer lay it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import SpecError
from graphopt.spec import dumps, dumps_pass, installed, loads
from graphopt.spec.positions import KeyPath, key_lines

SPEC = """\
# a comment
name = "x"   # another

[backbone]
source = "cifar"
name = "resnet20"
arguments = {
  num_classes = 3,  # a table over several lines, with a comma at its end
  in_chans = 3,
}
input = [3, 32,
  32]

[[pass]]
use = "freeze"
select = [
  "conv1",
  { path = "bn1" },
  { path = "layer1",
    exclude = [
      { path = "layer1.0" },
    ],
  },
]

[[pass]]
use = "freeze"
select = "layer2"
[pass.when]
epoch = 2

[train]
optimizer.lr = 0.5
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("backbone",), 4),
        (("backbone", "arguments"), 7),
        (("backbone", "arguments", "num_classes"), 8),
        (("backbone", "arguments", "in_chans"), 9),
        (("backbone", "input"), 11),
        (("backbone", "input", 2), 12),
        (("pass",), 14),
        (("pass", 0), 14),
        (("pass", 0, "select"), 16),
        (("pass", 0, "select", 0), 17),
        (("pass", 0, "select", 1, "path"), 18),
        (("pass", 0, "select", 2, "path"), 19),
        (("pass", 0, "select", 2, "exclude"), 20),
        (("pass", 0, "select", 2, "exclude", 0, "path"), 21),
        (("pass", 1), 26),
        (("pass", 1, "when"), 29),
        (("pass", 1, "when", "epoch"), 30),
        (("train", "optimizer"), 33),
        (("train", "optimizer", "lr"), 33),
    ],
)
def test_each_key_has_its_line(path: KeyPath, line: int) -> None:
    spec = loads(SPEC, file="s.toml")
    assert spec.lines[path] == line
    assert str(spec.where(*path)).startswith(f"s.toml:{line}")


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ('a = """\nb = 1\n]}"""\nc = 1\n', ("c",), 4),
        ("a = '''\nb = 1\n'''''\nc = 1\n", ("c",), 4),
        ('a = "#[{\\"\\\\"\nc = 1\n', ("c",), 2),
        ("a = '\\'\nc = 1\n", ("c",), 2),
        ('["a.b".\'c d\']\n"e\\u0066" = 1\n', ("a.b", "c d", "ef"), 2),
        ("[[a.b]]\n[[a.b]]\n[[a.b.c]]\nd = 1\n", ("a", "b", 1, "c", 0, "d"), 4),
        ("[a]\nt = 1979-05-27 07:32:00.5\nx = -1.5e-3 # }\ny = 1\n", ("a", "y"), 4),
        ("a = { b = [ # one\n  { c = 1, }, # two\n] }\r\n[d]\r\ne = 1\r\n", ("d", "e"), 5),
        ("a . b = 1\nc.'d'.e = 2", ("c", "d", "e"), 2),
    ],
)
def test_lines_are_right_after_any_token(text: str, path: KeyPath, line: int) -> None:
    assert key_lines(text)[path] == line


def paths(value: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
scalars = st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), keys)
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)), max_leaves=8)
breaks = st.sampled_from(["", "\n", " # ]}\n", "\t"])


@given(st.dictionaries(keys, values, max_size=4), st.data())
def test_two_readers_agree(table: dict[str, Any], data: st.DataObject) -> None:
    def written(value: Any) -> str:
        gap = data.draw(breaks)
        if isinstance(value, dict):
            return f"{{{gap}" + "".join(f"{written(k)} = {written(v)}{gap},{gap}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return f"[{gap}" + "".join(f"{written(v)}{gap},{gap}" for v in value) + "]"
        return scalar(value)

    text = "".join(f"{scalar(key)} = {written(value)}\n" for key, value in table.items())
    lines = key_lines(text)
    assert set(lines) == set(paths(tomli.loads(text)))
    rows = text.split("\n")
    for path, line in lines.items():
        assert not isinstance(path[-1], str) or scalar(path[-1]) in rows[line - 1]


def scalar(value: Any) -> str:
    return dumps_pass({"a": value}).partition(" = ")[2].rstrip("\n")


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_key_of_an_installed_spec_has_a_line(name: str) -> None:
    text = installed()[name].read_text()
    assert set(paths(tomli.loads(text))) <= set(key_lines(text))


MISTAKES = [
    ("num_classes = 3", 'num_classes = 3,\n  num_classes = "x"', "s.toml:9:"),
    ("num_classes = 3,", "num_classes = 3", "s.toml:9:"),
    ('{ path = "bn1" }', '{ pth = "bn1" }', "s.toml:18, pass 1 (freeze), select[1].pth"),
    ('path = "layer1",', 'path = "layer1", evry = 2,', "s.toml:19, pass 1 (freeze), select[2].evry"),
    ("[3, 32,", "[3, -32,", "s.toml:11, backbone.input[1]"),
    ("  32]", "  0]", "s.toml:12, backbone.input[2]"),
]


@pytest.mark.parametrize(("old", "new", "location"), MISTAKES, ids=[case[1] for case in MISTAKES])
def test_a_mistake_in_a_long_value_is_located(old: str, new: str, location: str) -> None:
    assert old in SPEC
    with pytest.raises(SpecError) as caught:
        loads(SPEC.replace(old, new, 1), file="s.toml")
    assert location in str(caught.value)


def test_what_is_written_is_read_again() -> None:
    spec = loads(SPEC)
    assert loads(dumps(spec)) == spec
