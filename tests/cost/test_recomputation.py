"""The dynamic programmes that choose what to run again."""

import itertools

import numpy as np
import pytest
import timm
import torch
from torch import fx

import graphopt
from graphopt.cost import forecast
from graphopt.cost import spans as spans_module
from graphopt.cost.recomputation import Run, chain_of, in_segments, shares, within
from graphopt.cost.retention import Operation, Retention
from graphopt.cost.spans import Spans
from graphopt.errors import PassError
from graphopt.ir.blocks import find_blocks
from graphopt.models import cifar_resnet
from graphopt.passes.checkpoint import Checkpoint


def drawn(seed, count=6):
    """A chain of operations, each with some storages of its own and perhaps its input among what it saves."""
    rng = np.random.default_rng(seed)
    graph, sizes = fx.Graph(), rng.integers(1, 20, 3 * count).tolist()
    node, output, operations = graph.placeholder("x"), None, []
    for number in range(count):
        node = graph.call_function(torch.relu, (node,))
        candidates = [output] if output is not None else []
        candidates += [number, count + number]
        saved = frozenset(s for s in candidates if rng.random() < 0.6) | {2 * count + number}
        flops, forward, backward, entry = rng.integers(1, 9, 4).tolist()
        operations.append(Operation(node, saved, frozenset({number}), frozenset(), flops, 1, flops, 1, forward, backward, entry))
        output = number
    return Retention(tuple(operations), sizes, frozenset())


def ways(count, spans):
    """All choices of disjoint spans, in order."""
    yield []
    for number, (first, last) in enumerate(spans):
        for rest in ways(count, [s for s in spans[number + 1 :] if s[0] > last]):
            yield [(first, last), *rest]


def taken(measured, chosen):
    """FLOPs and peak of a step with these spans run again, by following it."""
    held, peak, flops, place = set(), 0, 0, 0
    ends = dict(chosen)
    while place < len(measured.operations):
        last = ends.get(place, place)
        operations = measured.operations[place : last + 1]
        if place in ends:
            flops += sum(o.flops for o in operations)
            held |= measured.inputs(place, last)
        live = set(held)
        for operation in operations:
            live |= operation.saved
            entry = operations[-1].entry if place in ends else 0
            peak = max(peak, sum(measured.sizes[n] for n in live) + max(operation.forward + entry, operation.backward))
        held = held if place in ends else live
        place = last + 1
    return flops, peak


def spans_of(measured, length):
    count = len(measured.operations)
    segments = tuple((a, min(a + length, count) - 1) for a in range(0, count, length))
    return Spans(measured, segments, (False, *(True for _ in segments[2:]), False))


@pytest.mark.parametrize("seed", range(6))
def test_of_runs_of_segments_it_finds_what_trying_all_finds(seed, monkeypatch):
    monkeypatch.setattr(spans_module, "GRAIN", 1e-9)
    measured = drawn(seed)
    spans = spans_of(measured, 1)
    every = [(a, b) for a in range(1, 5) for b in range(a, 5)]
    tried = [taken(measured, way) for way in ways(6, every)]
    plain = spans.cheapest(float("inf"))
    assert (plain.spans, plain.peak) == ((), taken(measured, [])[1])
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.4):
        found = spans.cheapest(share * plain.peak)
        fewest = min((flops for flops, peak in tried if peak <= share * plain.peak), default=None)
        assert (None if found is None else int(found.price)) == fewest


@pytest.mark.parametrize("seed", range(6))
def test_inside_segments_a_lower_peak_never_costs_less_and_is_that_of_the_step(seed):
    measured = drawn(seed, 15)
    found = list(spans_of(measured, 3).choices())
    assert any(last - first < 2 for choice in found for first, last in choice.spans)
    for choice in found:
        assert (int(choice.price), choice.peak) == taken(measured, choice.spans)
    for more, less in itertools.pairwise(found):
        assert less.peak < more.peak
        assert less.price >= more.price


@pytest.fixture(scope="module")
def graph():
    return graphopt.trace(cifar_resnet.build("resnet20"), (3, 16, 16))


def test_runs_are_named_by_their_blocks(graph):
    assert within(graph, 1.0) == ()
    names = {name for run in within(graph, 0.7) for name in run.blocks}
    assert names
    assert names <= {block.name for block in find_blocks(graph)}
    with pytest.raises(PassError, match=r"no choice of blocks has a peak of 0.01 of the plain one: the lowest is 0\.\d+"):
        within(graph, 0.01)


def test_what_costs_no_flops_runs_again_first(graph):
    nodes = {str(node): node for node in graph.nodes}
    for _, runs in shares(graph)[:8]:
        for run in runs:
            *others, last = [nodes[name] for name in run.nodes]
            assert "conv" in last.meta["origin"].path  # it saves its input before it starts
            assert not any("conv" in str(node.target) for node in others)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_predicted_peak_is_that_of_the_step(graph, share):
    def peak(passes):
        plan = graphopt.compile(cifar_resnet.build("resnet20"), passes, input=(3, 16, 16), verify="off", costs=False)
        return forecast(plan.module, (3, 16, 16), 8, optimizer=None).peak_activation_bytes

    predicted = next(reached for reached, _ in shares(graph) if reached <= share)
    assert peak(Checkpoint(budget=share)) / peak([]) == pytest.approx(predicted, abs=0.005)


@pytest.mark.parametrize("by_memory", [False, True])
def test_segments_are_the_blocks_in_order(graph, by_memory):
    names = [block.name for block in find_blocks(graph)]
    for count in (1, 2, 4, len(names)):
        found = in_segments(graph, count, by_memory=by_memory)
        assert [name for run in found for name in run.blocks] == names[: sum(len(run.blocks) for run in found)]
        assert count - 1 <= len(found) <= count
    assert in_segments(graph, "every block") == in_segments(graph, len(names))


def test_the_last_segment_runs_again_only_where_that_helps(graph):
    chain = chain_of(graph)
    names = tuple(Run((block.name,)) for block in find_blocks(graph))
    found = in_segments(graph, "every block")
    assert found == names[:-1]
    assert chain.peak(found) <= chain.peak(names)


def test_segments_of_blocks_that_cannot_be_cut_between_are_even():
    model = timm.create_model("densenet121", growth_rate=4, block_config=(3, 3), num_classes=3)
    graph = graphopt.trace(model, (3, 32, 32))
    names = [block.name for block in find_blocks(graph)]
    found = in_segments(graph, len(names) - 1)
    assert [name for run in found for name in run.blocks] == names
