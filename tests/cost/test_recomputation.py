"""The dynamic programme that chooses which blocks to run again."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import timm

import graphopt
from graphopt.cost.figures import Work
from graphopt.cost.partition import Piece, peaks
from graphopt.cost.recomputation import chain_of, cheapest, choices, in_segments, shares, within
from graphopt.errors import PassError
from graphopt.ir.blocks import find_blocks
from graphopt.models import cifar_resnet


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
    pieces = drawn(seed, 9)
    found = list(choices(pieces, peaks(pieces, 0), [True] * 9))
    assert found[0].runs == ()
    for more, less in itertools.pairwise(found):
        assert less.peak < more.peak
        assert less.flops >= more.flops


@pytest.fixture(scope="module")
def graph():
    return graphopt.trace(cifar_resnet.build("resnet20"), (3, 16, 16))


def test_runs_are_named_by_their_blocks(graph):
    assert within(graph, 1.0) == ()
    names = [name for run in within(graph, 0.7) for name in run]
    assert names
    assert set(names) <= {block.name for block in find_blocks(graph)}
    with pytest.raises(PassError, match=r"no choice of blocks has a peak of 0.01 of the plain one: the lowest is 0\.\d+"):
        within(graph, 0.01)


def test_the_peak_of_a_choice_is_that_of_its_runs(graph):
    chain, found = chain_of(graph), shares(graph)
    plain = chain.peak(())
    assert [chain.peak(runs) / plain for _, runs in found] == pytest.approx([share for share, _ in found])


@pytest.mark.parametrize("by_memory", [False, True])
def test_segments_are_the_blocks_in_order(graph, by_memory):
    names = [block.name for block in find_blocks(graph)]
    for count in (1, 2, 4, len(names)):
        found = in_segments(graph, count, by_memory=by_memory)
        assert [name for run in found for name in run] == names[: sum(map(len, found))]
        assert count - 1 <= len(found) <= count
    assert in_segments(graph, "every block") == in_segments(graph, len(names))


def test_the_last_segment_runs_again_only_where_that_helps(graph):
    chain = chain_of(graph)
    names = tuple((block.name,) for block in find_blocks(graph))
    found = in_segments(graph, "every block")
    assert found == names[:-1]
    assert chain.peak(found) <= chain.peak(names)


def test_segments_of_blocks_that_cannot_be_cut_between_are_even():
    model = timm.create_model("densenet121", growth_rate=4, block_config=(3, 3), num_classes=3)
    graph = graphopt.trace(model, (3, 32, 32))
    names = [block.name for block in find_blocks(graph)]
    found = in_segments(graph, len(names) - 1)
    assert [name for run in found for name in run] == names
