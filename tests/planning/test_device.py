"""What a plan and its phases need of a GPU, and budgets that mean one."""

import json
from dataclasses import replace

import pytest

import graphopt
from graphopt.cost import forecast
from graphopt.cost.devices import CONTEXT, DEVICES
from graphopt.passes.checkpoint import Checkpoint
from graphopt.planning import budget, device
from graphopt.planning.budget import Budget, Search, Trial, largest_batch, peak
from graphopt.planning.device import forecast_neediest, forecast_phases, neediest, with_memory
from graphopt.spec import loads

L4 = DEVICES["L4"]
SPEC = """
verify = "off"
[backbone]
source = "python"
name = "tests.support.backbones:Small"
input = [3, 16, 16]
[train]
batch = 256
epochs = 4
"""
FREEZE = '[[pass]]\nuse = "freeze"\nselect = ["stem", "blocks.0"]\nwhen = { epoch = 2 }\n'
CHECKPOINT = '[[pass]]\nuse = "checkpoint"\nsegments = 4\n'


def plan_of(text):
    return graphopt.compile(None, loads(text), trust=True, verify="off")


def test_a_report_says_what_the_step_needs_before_and_after():
    plan = plan_of(SPEC + CHECKPOINT)
    assert "capacity_bytes" not in plan.report.to_dict()["before"]
    report = json.loads(json.dumps(with_memory(plan, L4).report.to_dict()))
    before, after = report["before"], report["after"]
    assert before["cuda"]["device"] == after["cuda"]["device"] == "L4"
    assert after["capacity_bytes"] < before["capacity_bytes"] <= before["peak_reserved_bytes"]
    assert before["peak_bytes"] < before["peak_reserved_bytes"]


def test_a_plan_without_active_passes_needs_what_the_backbone_does():
    report = with_memory(plan_of(SPEC + FREEZE), L4).report
    assert report.before.cuda.capacity == report.after.cuda.capacity


def test_a_report_without_costs_stays_as_it_is():
    plan = graphopt.compile(None, loads(SPEC), trust=True, verify="off", costs=False)
    assert with_memory(plan, L4) is plan


def test_each_phase_has_its_need():
    first, second = forecast_phases(plan_of(SPEC + FREEZE).phases(4), L4)
    assert (first.epoch, second.epoch) == (0, 2)
    assert second.memory.capacity.high < first.memory.capacity.high
    assert first.to_dict()["peak_reserved_bytes"] == first.memory.reserved.low


def test_the_phase_that_needs_most_has_the_highest_peak_or_comes_near_it_where_memory_is_short(monkeypatch):
    phases = plan_of(SPEC + FREEZE).phases(4)
    peaks = [forecast(phase.plan.module, phase.plan.graph.input, phase.plan.batch).peak_bytes for phase in phases]
    needs = forecast_phases(phases, L4)
    assert neediest(needs) is needs[0]
    simulated: list[int] = []
    monkeypatch.setattr(device, "forecast_phases", lambda p, d: simulated.append(len(tuple(p))) or forecast_phases(p, d))
    short = replace(L4, memory=needs[1].memory.reserved.high + CONTEXT)
    assert forecast_neediest(phases, peaks, L4).epoch == 0
    assert forecast_neediest(phases, [9, 10], L4).epoch == 2
    assert forecast_neediest(phases, [9, 10], short).epoch == 0
    assert forecast_neediest(phases, [9, 11], short).epoch == 2
    assert simulated == [1, 1, 1, 1, 1, 0]


@pytest.fixture(scope="module")
def search():
    return Search(loads(SPEC), device=L4, trust=True)


def test_a_device_is_a_budget():
    assert Budget(device=L4).memory == L4.usable
    assert Budget(memory=2**30, device=L4).memory == 2**30
    assert Budget(device=L4).to_dict()["device"] == "L4"


def test_the_batch_for_a_device_fits_it_and_the_next_does_not(search):
    room = Budget(memory=64 * 2**20, device=L4)
    cost_at = lambda batch: search.cost(search.plan.phases(4), batch)  # noqa: E731
    batch, cost = largest_batch(cost_at, room)
    assert cost.cuda.fits(room.memory)
    assert not cost_at(batch + 1).cuda.fits(room.memory)


def test_a_suggestion_for_a_device_fits_its_allocator(search, monkeypatch):
    monkeypatch.setattr(budget, "ladders", lambda _: [(Trial("4 segments", (Checkpoint(segments=4),)),)])
    assert peak(search.backbone) == search.backbone.cuda.reserved.high
    found = search.suggest(Budget(memory=search.backbone.cuda.capacity.high - 2**21, device=L4))
    assert not found.candidates[0].fits
    assert found.chosen.cost.cuda.fits(found.budget.memory)
    assert json.loads(json.dumps(found.to_dict()))["device"] == "L4"
