"""Module paths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ir.paths import containers, is_below, lineage, owner


@pytest.mark.parametrize(
    ("path", "ancestors", "inside", "parent"),
    [
        ("", [""], [], ""),
        ("a", ["", "a"], [], ""),
        ("a.b", ["", "a", "a.b"], ["a"], "a"),
        ("layer1.0.conv1", ["", "layer1", "layer1.0", "layer1.0.conv1"], ["layer1", "layer1.0"], "layer1.0"),
    ],
)
def test_what_holds_a_path(path: str, ancestors: list[str], inside: list[str], parent: str) -> None:
    assert list(lineage(path)) == ancestors
    assert list(containers(path)) == inside
    assert owner(path) == parent


@pytest.mark.parametrize(
    ("name", "paths", "expected"),
    [
        ("a.b", ["a"], True),
        ("a", ["a"], True),
        ("a", ["a.b"], False),
        ("ab", ["a"], False),
        ("a.b", ["c", "a.b"], True),
        ("a", [""], True),
        ("", [""], True),
        ("a", [], False),
    ],
)
def test_below(name: str, paths: list[str], expected: bool) -> None:
    assert is_below(name, paths) is expected
    assert is_below(name, frozenset(paths)) is expected


paths = st.lists(st.sampled_from(["a", "b", "0", "conv1"]), max_size=4).map(".".join)


@given(paths, paths)
def test_a_path_is_below_what_its_lineage_has(one: str, other: str) -> None:
    assert is_below(one, [other]) is (other in lineage(one))
