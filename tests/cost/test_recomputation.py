"""The dynamic programme that chooses which blocks to run again."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import graphopt
from graphopt.cost.figures import Work
from graphopt.cost.partition import Piece, peaks
from graphopt.cost.recomputation import cheapest, choices, recomputed_within
from graphopt.errors import PassError
from graphopt.ir.blocks import find_blocks
from tests.support.backbones import Small


def drawn(seed, count=6):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 20, count + 1).tolist()
    ends = [((i, sizes[i]), (i + 1, sizes[i + 1])) for i in range(count)]
    return [Piece(*rng.integers(1, 50, 3).tolist(), {}, *pair, True, Work(), flops=int(rng.integers(1, 9))) for pair in ends]


def ways(count, free):
    """All divisions of a chain into kept pieces and runs: (first, last, whether it is run again)."""
    if not count:
        yield []
        return
    for length in range(1, count + 1):
        first, last = count - length, count - 1
        kept = [False] if length == 1 else []
        again = [True] if all(free[first : last + 1]) else []
        for rest, choice in itertools.product(ways(first, free), kept + again):
            yield [*rest, (first, last, choice)]


def by_trying_all(pieces, table, free, limit):
    best = None
    for way in ways(len(pieces), free):
        held = peak = flops = 0
        for first, last, again in way:
            peak = max(peak, held + table[first, last])
            held += pieces[first].input[1] + (0 if again else pieces[first].saved)
            flops += sum(p.flops for p in pieces[first : last + 1]) if again else 0
        if peak <= limit and (best is None or flops < best):
            best = flops
    return best


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_trying_all_finds(seed):
    pieces, free = drawn(seed), [False, True, True, True, True, False]
    table = peaks([replace(p, has_parameters=True) for p in pieces], 0)
    plain = cheapest(pieces, table, free, float("inf"))
    assert plain.flops == 0
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.4):
        found = cheapest(pieces, table, free, share * plain.peak)
        assert (None if found is None else found.flops) == by_trying_all(pieces, table, free, share * plain.peak)


@pytest.mark.parametrize("seed", range(6))
def test_a_lower_peak_never_costs_less(seed):
    found = list(choices(drawn(seed, 9), [True] * 9))
    assert found[0].runs == ()
    for more, less in itertools.pairwise(found):
        assert less.peak < more.peak
        assert less.flops >= more.flops


def test_runs_are_named_by_their_blocks():
    graph = graphopt.trace(Small(), (3, 16, 16))
    blocks = find_blocks(graph)
    assert recomputed_within(graph, blocks, 1.0) == ()
    names = [name for run in recomputed_within(graph, blocks, 0.7) for name in run]
    assert names
    assert set(names) <= {block.name for block in blocks}
    with pytest.raises(PassError, match=r"no choice of blocks has a peak of 0.01 of the plain one: the lowest is 0\.\d\d"):
        recomputed_within(graph, blocks, 0.01)
