"""The dynamic programmes that choose cuts by memory and by time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.cost.figures import Work
from graphopt.cost.partition import Piece, assign, best, best_recomputed, peaks, pieces_of, sums
from graphopt.errors import PassError
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small


def ways(pieces: int, parts: int) -> Any:
    """All divisions of a chain: the last piece of each part but the last, and the first and last piece of each part."""
    for ends in itertools.combinations(range(pieces - 1), parts - 1):
        yield ends, list(itertools.pairwise([-1, *ends, pieces - 1]))


@pytest.mark.parametrize("seed", range(8))
def test_best_finds_what_trying_all_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 8
    table = np.where(rng.random((n, n)) < 0.15, math.inf, rng.integers(1, 50, (n, n)).astype(float))
    for parts in (2, 3, 4, 5):
        found = [(max(table[a + 1, b] for a, b in edges), ends) for ends, edges in ways(n, parts)]
        peak, ends = best(table, parts)
        assert peak == min(found)[0]
        assert math.isinf(peak) or (peak, ends) in found


@pytest.mark.parametrize("seed", range(8))
def test_best_recomputed_finds_what_trying_all_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 7
    sizes = rng.integers(1, 20, n + 1).tolist()
    pieces = [
        Piece(
            *rng.integers(1, 50, 3).tolist(), {}, (i, sizes[i]), (i + 1, sizes[i + 1]), has_parameters=bool(rng.random() < 0.5), work=Work()
        )
        for i in range(n)
    ]
    table = peaks([replace(p, has_parameters=True) for p in pieces], 0)
    for parts in (1, 2, 3, 4):
        found = []
        for ends, edges in ways(n, parts):
            # While a part runs again, the inputs of those before it are live.
            stored = list(itertools.accumulate((sizes[a + 1] for a, _ in edges), initial=0))
            found.append((max(held + table[a + 1, b] for held, (a, b) in zip(stored, edges, strict=False)), ends))
        peak, ends = best_recomputed(pieces, parts)
        assert peak == min(found)[0]
        assert (peak, ends) in found


ASSIGNED = {
    "one each": ([3.0, 1.0, 2.0], 3, [[0], [1], [2]]),
    "all on one": ([3.0, 1.0, 2.0], 1, [[0, 1, 2]]),
    "the slowest decides": ([1.0, 1.0, 1.0, 4.0], 2, [[0, 1, 2], [3]]),
    "the last ones together": ([4.0, 1.0, 1.0, 1.0], 2, [[0], [1, 2, 3]]),
    "of equal slowest, the most even": ([5.0, 1.0, 1.0, 2.0], 3, [[0], [1, 2], [3]]),
    "frozen and dropped modules free their ranks": ([0.0, 0.0, 1.0, 1.0], 2, [[0, 1, 2], [3]]),
    "nothing to do": ([0.0, 0.0], 2, [[0], [1]]),
    "more ranks than modules": ([1.0, 2.0], 4, [[], [], [0], [1]]),
}


@pytest.mark.parametrize(("seconds", "ranks", "runs"), ASSIGNED.values(), ids=ASSIGNED)
def test_runs_of_modules_make_the_slowest_rank_as_fast_as_can_be(seconds: list[float], ranks: int, runs: list[list[int]]) -> None:
    assert [list(run) for run in assign(seconds, ranks)] == runs


@pytest.mark.parametrize("seconds", [(1, 1, 1, 1), (5, 1, 1, 1), (1, 2, 3, 4), (0, 0, 3, 1), (2, 7, 1, 8)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_no_other_runs_have_a_faster_slowest_rank(seconds: tuple[int, ...], ranks: int) -> None:
    runs = assign(seconds, ranks)
    assert [n for run in runs for n in run] == [0, 1, 2, 3]
    least = min(max(sum(seconds[a + 1 : b + 1]) for a, b in edges) for _, edges in ways(4, ranks))
    assert max(sum(seconds[run.start : run.stop]) for run in runs) == least


def test_what_comes_before_the_first_gradient_of_a_part_counts_apart() -> None:
    inf = math.inf
    table = sums([10.0, 20.0, 30.0], [1.0, 2.0, 3.0], [True, False, True])
    assert table.tolist() == [[1, 21, 51], [inf, 2, 5], [inf, inf, 3]]


def test_pieces_are_measured_once_per_graph() -> None:
    graph = graphopt.trace(Small(), (3, 8, 8))
    assert pieces_of(graph) is pieces_of(graph)


def test_what_does_not_depend_on_the_image_may_be_computed_in_place() -> None:
    class Biased(Small):
        def __init__(self) -> None:
            super().__init__()
            self.grid = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
            self.register_buffer("places", torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.grid(self.places).mean()

    plan = graphopt.compile(Biased(), Supervise(modules=2, balance="memory"), input=(3, 8, 8), costs=False)
    assert plan.needs.targets


def test_more_segments_than_blocks_that_end_at_cuts_are_refused() -> None:
    with pytest.raises(PassError, match="4 blocks"):
        graphopt.compile(Small(), Checkpoint(segments=5, balance="memory"), input=(3, 8, 8), costs=False)
