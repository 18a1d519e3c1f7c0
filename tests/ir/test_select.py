"""What each selector names: a table, and properties that hold for every selector."""

from __future__ import annotations

from functools import cache
from typing import Any

import pydantic
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from graphopt import Graph, SelectError, Selector, select, trace
from graphopt.ir.regions import region_at
from graphopt.ir.select import compile_pattern

parse = pydantic.TypeAdapter(Selector).validate_python


@cache
def resnet18() -> Graph:
    return trace(torchvision.models.resnet18(), (3, 32, 32), compare=False)


STAGES = ["layer1", "layer2", "layer3", "layer4"]
BLOCKS = [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]

CASES: list[tuple[Any, list[str]]] = [
    ("layer1", ["layer1"]),
    ("layer1.**", ["layer1"]),
    ("layer1.*", ["layer1.0", "layer1.1"]),
    ("layer*", STAGES),
    ("layer*.0", BLOCKS[::2]),
    ("**.downsample", ["layer2.0.downsample", "layer3.0.downsample", "layer4.0.downsample"]),
    ("layer2.**.conv1", ["layer2.0.conv1", "layer2.1.conv1"]),
    ("layer?.1.bn2", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]),
    ("re:layer[12]", ["layer1", "layer2"]),
    ("re:layer[12]\\.0\\.conv\\d", ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]),
    ("**", [""]),
    (["fc", "conv1"], ["conv1", "fc"]),  # execution order, not the list's
    (["layer1", "layer1.0"], ["layer1"]),  # none inside another
    (["layer3", {"blocks": True, "first": 1}], ["layer1.0", "layer3"]),
    ({"blocks": True}, BLOCKS),
    ({"blocks": True, "every": 2}, BLOCKS[1::2]),
    ({"blocks": True, "every": 3}, [BLOCKS[2], BLOCKS[5]]),
    ({"blocks": True, "every": 3, "offset": 0}, BLOCKS[::3]),
    ({"blocks": True, "every": 3, "offset": 1}, BLOCKS[1::3]),
    ({"blocks": True, "first": 3}, BLOCKS[:3]),
    ({"blocks": True, "first": 0.5}, BLOCKS[:4]),
    ({"blocks": True, "last": 0.25}, BLOCKS[6:]),
    ({"blocks": True, "last": 2, "every": 2}, [BLOCKS[7]]),
    ({"blocks": True, "path": "layer2"}, BLOCKS[2:4]),
    ({"blocks": True, "path": ["layer2", "layer4.1"]}, [*BLOCKS[2:4], BLOCKS[7]]),
    ({"blocks": True, "after": "layer2"}, BLOCKS[4:]),
    ({"blocks": True, "before": "layer2"}, BLOCKS[:2]),
    ({"blocks": True, "between": ["layer1", "layer4"]}, BLOCKS[2:6]),
    ({"blocks": True, "exclude": "layer1.**"}, BLOCKS[2:]),
    ({"blocks": True, "exclude": ["layer1", {"path": "layer4.*"}]}, BLOCKS[2:6]),
    ({"blocks": True, "exclude": "layer1.0", "first": 2}, BLOCKS[1:3]),
    ({"blocks": True, "type": "Basic*"}, BLOCKS),
    ({"type": "Linear"}, ["fc"]),
    ({"type": "*Pool2d"}, ["maxpool", "avgpool"]),
    ({"type": "Conv2d", "path": "layer1.**"}, ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]),
    ({"type": ["Linear", "MaxPool2d"]}, ["maxpool", "fc"]),
    ({"path": "layer*", "exclude": "layer3"}, ["layer1", "layer2", "layer4"]),
]


@pytest.mark.parametrize(("selector", "names"), CASES, ids=[str(c[0]) for c in CASES])
def test_names(selector: Any, names: list[str]) -> None:
    assert [r.name for r in select(parse(selector), resnet18())] == names


WRONG: list[tuple[Any, str]] = [
    ("layr1.*", "'layer1'"),
    ("layer5", "layer"),
    (["layer1", "layer9.0"], "layer9.0"),
    ("LAYER1", "'layer1'"),
    ("re:layer[", "no regular expression"),
    ({"type": "Conv3d"}, "'Conv2d'"),
    ({"blocks": True, "path": "fc"}, "no block lies at or below"),
    ({"blocks": True, "after": "layer4"}, "empty after"),
    ({"blocks": True, "every": 9}, "empty after"),
    ({"blocks": True, "exclude": "**"}, "empty after"),
    ({"blocks": True, "before": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("selector", "says"), WRONG, ids=[str(c[0]) for c in WRONG])
def test_what_matches_nothing_is_an_error_with_near_misses(selector: Any, says: str) -> None:
    with pytest.raises(SelectError, match=says):
        select(parse(selector), resnet18())


@pytest.mark.parametrize(
    "selector",
    [{}, {"every": 2}, {"blocks": False}, {"blocks": True, "offset": 1}, {"blocks": True, "first": 1, "last": 1},
     {"blocks": True, "between": ["layer1", "layer4"], "after": "layer2"}, {"path": "*", "between": ["0", "5"], "before": "3"},
     {"blocks": True, "first": 1.5}, {"blocks": True, "first": 0}, {"blocks": True, "evry": 2}, {"blocks": True, "every": "2"}, "", 3],
)  # fmt: skip
def test_what_is_no_selector_is_refused_when_parsed(selector: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        parse(selector)


_paths = st.sampled_from(resnet18().paths)


@given(st.lists(_paths, min_size=1, max_size=4))
def test_a_union_is_ordered_disjoint_and_covers_its_parts(paths: list[str]) -> None:
    graph = resnet18()
    regions = select(tuple(paths), graph)
    order = {n: i for i, n in enumerate(graph.nodes)}
    starts = [order[r.nodes[0]] for r in regions]
    assert starts == sorted(starts)
    nodes = [n for r in regions for n in r.nodes]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == {n for p in paths for n in region_at(graph, p).nodes}


@given(st.integers(1, 8), st.integers(1, 8))
def test_every_takes_the_multiples_of_what_first_left(first: int, every: int) -> None:
    if every > first:
        return
    regions = select(parse({"blocks": True, "first": first, "every": every}), resnet18())
    assert [r.name for r in regions] == BLOCKS[:first][every - 1 :: every]


@given(_paths)
def test_a_literal_path_matches_itself_and_double_star_whatever_is_below(path: str) -> None:
    assert compile_pattern(path)(path)
    assert compile_pattern("**")(path)
    assert compile_pattern(f"{path}.**")(path)
    assert compile_pattern(f"{path}.**")(f"{path}.a.b")
    assert not compile_pattern(f"{path}.*")(path)
    assert not compile_pattern(path)(f"{path}x")


@pytest.mark.parametrize("pattern", ["re:(.+)+!", "re:(a|aa)+b", "re:((a*)*)*", "re:(?=(a+)+)b", "re:(?:x{1,3}){2}"])
def test_an_expression_that_can_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(SelectError, match="for ever"):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", [r"re:layer[12](\.\d)+", "re:(conv|bn)1", "re:a*b*", "re:(a+)?b", "re:(a|bc(d|ef))", "re:layer(1|2).*"])
def test_other_expressions_are_not(pattern: str) -> None:
    assert compile_pattern(pattern) is not None


@pytest.mark.parametrize("pattern", ["**." * 200 + "x", "**." + "*" * 200 + "x", "**." * 200 + "*" * 200 + ".x"])
def test_repeated_stars_take_no_longer_than_one(pattern: str) -> None:
    assert compile_pattern(pattern)("layer1.0.conv1.weight.x")
    assert not compile_pattern(pattern)("layer1.0.conv1.weight.in.a.deep.path.of.names")
