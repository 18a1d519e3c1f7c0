"""A run's costs are its phases' costs times their steps."""

import pytest

import graphopt
from graphopt.cost import CostError, integrate
from graphopt.passes.freeze import Freeze
from tests.backbones import Small

PREFIX = ("stem", "blocks.0", "blocks.1")


def plan(**when):
    return graphopt.compile(Small(), Freeze(select=PREFIX, when=when), input=(3, 8, 8), batch=4, verify="off")


@pytest.fixture(scope="module")
def costs():
    frozen = graphopt.compile(Small(), Freeze(select=PREFIX), input=(3, 8, 8), batch=4, verify="off").report
    return frozen.before, frozen.after


def test_phases_add_up(costs):
    before, after = costs
    run = integrate(plan(epoch=3, until=5), 10, 7, flops_per_second=1e9)
    assert [(p.start, p.end, p.steps) for p in run.phases] == [(0, 3, 21), (3, 5, 14), (5, 10, 35)]
    assert run.flops == 56 * before.flops + 14 * after.flops
    assert run.baseline_flops == 70 * before.flops
    assert run.peak_bytes == before.peak_bytes
    assert run.final.flops == before.flops
    assert run.seconds == run.flops / 1e9
    assert run.to_dict()["phases"][1]["flops"] == 14 * after.flops


def test_a_trigger_at_the_first_epoch_leaves_no_empty_phase(costs):
    run = integrate(plan(epoch=0), 2, 1)
    assert [(p.start, p.end) for p in run.phases] == [(0, 2)]
    assert run.flops == 2 * costs[1].flops


def test_recorded_decisions_are_replayed(costs):
    scored = plan(score="change")
    assert integrate(scored, 4, 1).unforeseen == (0,)
    run = integrate(scored, 4, 1, decisions=[graphopt.Decision(index=0, epoch=1)])
    assert run.unforeseen == ()
    assert run.flops == costs[0].flops + 3 * costs[1].flops


def test_a_plan_without_costs_is_refused():
    bare = graphopt.compile(Small(), [], input=(3, 8, 8), costs=False)
    with pytest.raises(CostError, match="without costs"):
        integrate(bare, 2, 2)
    with pytest.raises(CostError, match="at least one epoch"):
        integrate(bare, 0, 2)
