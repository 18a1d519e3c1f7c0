"""Where a graph can be cut, and which cuts are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import PassError, SelectError
from graphopt.ir.partition import by_stage, cut_candidates, evenly, explicit, most_parts
from tests.support.backbones import Small


@pytest.fixture(scope="module")
def graph() -> graphopt.Graph:
    return graphopt.trace(Small(), (3, 8, 8))


def test_a_candidate_has_the_name_of_the_largest_region_that_ends_there(graph: graphopt.Graph) -> None:
    candidates = cut_candidates(graph)
    assert [c.label for c in candidates][:4] == ["stem", "blocks.0 (add)", "blocks.0", "blocks.1 (add_1)"]
    assert [c.has_parameters for c in candidates][:4] == [True, True, False, True]
    assert most_parts(candidates) == 1 + sum(c.has_parameters for c in candidates)


def test_parts_have_as_many_blocks_each(graph: graphopt.Graph) -> None:
    assert [c.label for c in evenly(graph, cut_candidates(graph), 2)] == ["blocks.1"]
    assert [c.label for c in evenly(graph, cut_candidates(graph), 4)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_too_many_parts_and_missing_stages_are_refused(graph: graphopt.Graph) -> None:
    candidates = cut_candidates(graph)
    most = most_parts(candidates)
    with pytest.raises(PassError, match=rf"{most + 1} parts need {most} cuts.*Ask for {most} or fewer"):
        evenly(graph, candidates, most + 1)
    with pytest.raises(PassError, match="there are no stages"):
        by_stage(graph, candidates, None)


def test_explicit_cuts_are_sorted_and_checked(graph: graphopt.Graph) -> None:
    candidates = cut_candidates(graph)
    assert [c.label for c in explicit(graph, candidates, ["blocks.2", "blocks.0"])] == ["blocks.0", "blocks.2"]
    with pytest.raises(PassError, match=r"other paths go around it.*nearest cuts are after 'blocks.0' and"):
        explicit(graph, candidates, ["blocks.1.conv1"])
    with pytest.raises(SelectError, match="Did you mean"):
        explicit(graph, candidates, ["blocks.7"])
    with pytest.raises(SelectError, match=r"Did you mean 'blocks.0 \(add\)'"):
        explicit(graph, candidates, ["blocks.0.(add)"])


def test_the_samples_must_be_in_the_first_dimension() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            turned = self.second(self.first(x).transpose(0, 1))
            return self.third(turned.transpose(0, 1)).mean(1)

    candidates = cut_candidates(graphopt.trace(Turned(), (7, 5)))
    assert [c.node.name for c in candidates] == ["first", "transpose_1"]


def test_what_is_overwritten_in_place_is_no_candidate() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu_(self.first(x)))

    assert [c.label for c in cut_candidates(graphopt.trace(Overwriting(), (5,)))] == ["(relu_)"]
