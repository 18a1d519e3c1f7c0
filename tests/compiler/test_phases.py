"""Phases of a plan: foreseen from the triggers alone, or replayed from decisions."""

from __future__ import annotations

import time
from typing import Any

import pytest

import graphopt
from graphopt.compiler import plan as plan_module
from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision, active_regions, step_at
from graphopt.errors import PassError
from graphopt.models.cifar_resnet import build
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small

THAWED = Freeze(select=("stem",), when={"epoch": 2, "until": 5})
STEPS = Freeze(select=("blocks.0", "blocks.1"), when=[{"epoch": 2, "upto": "blocks.0"}, {"epoch": 4, "upto": "blocks.1"}])
MEASURED = Freeze(select=("blocks.3",), when={"score": "change"})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return graphopt.compile(Small(drop=0.0), [THAWED, STEPS, MEASURED], input=(3, 8, 8), verify="off", costs=False)


def frozen(plan: Plan) -> set[str]:
    return {name.rpartition(".")[0] for name, p in plan.module.named_parameters() if not p.requires_grad}


def test_decisions_are_foreseen_without_compiling_and_measurements_are_not(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "compile_phase", None)
    decisions = [(d.index, d.epoch, d.action, d.regions) for d in plan.foreseen(6)]
    assert decisions == [(0, 2, "apply", None), (1, 2, "apply", ("blocks.0",)), (1, 4, "apply", ("blocks.1",)), (0, 5, "undo", None)]
    assert [d.epoch for d in plan.foreseen(3)] == [2, 2]


def test_phases_have_no_gaps_and_follow_the_decisions(plan: Plan) -> None:
    phases = plan.phases(6)
    assert [(p.start, p.end) for p in phases] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert phases[0].plan is plan
    assert tuple(d for p in phases for d in p.decisions) == plan.foreseen(6)
    assert ["stem" in frozen(p.plan) for p in phases] == [False, True, True, False]
    assert ["blocks.1.conv1" in frozen(p.plan) for p in phases] == [False, False, True, True]


def test_phases_share_the_memory_of_the_backbone_but_not_what_is_frozen(plan: Plan) -> None:
    own, later = dict(plan.backbone.named_parameters()), plan.phases(6)[1].plan.module
    assert frozen(plan.phases(6)[1].plan)
    for name, parameter in later.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr()
        assert own[name].requires_grad
    advanced = plan.advance_to(plan.foreseen(6), verify="off").module
    assert all(parameter.data_ptr() != own[name].data_ptr() for name, parameter in advanced.named_parameters())


def test_decisions_of_a_run_are_replayed(plan: Plan) -> None:
    decisions = (Decision(index=2, epoch=0, regions=("blocks.3",)), Decision(index=0, epoch=9))
    (phase,) = plan.phases(4, decisions)
    assert (phase.start, phase.end, phase.decisions) == (0, 4, decisions[:1])
    assert "blocks.3.conv1" in frozen(phase.plan)


@pytest.mark.parametrize("epoch", range(6))
def test_one_phase_is_found_by_its_epoch(plan: Plan, epoch: int) -> None:
    expected = next(p.plan for p in plan.phases(6) if p.start <= epoch < p.end)
    found = plan.phase_at(epoch, 6, verify="off")
    assert found.decisions == expected.decisions
    assert frozen(found) == frozen(expected)


@pytest.mark.parametrize(
    "when",
    [
        *({"epoch": 0}, {"epoch": 3}, {"epoch": 2, "until": 5}, {"epoch": 70}, [{"epoch": 1, "upto": "a"}, {"epoch": 6, "upto": "d"}]),
        *({"schedule": "progressive"}, {"schedule": "progressive", "gamma": 3.0}),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2, 7, 40])
def test_a_trigger_names_every_epoch_at_which_it_fires(when: object, epochs: int) -> None:
    names = ("a", "b", "c", "d")
    trigger = Freeze(select=("fc",), when=when).when
    asked: dict[bool, list[Decision]] = {}
    for all_epochs in (True, False):
        decisions: tuple[Decision, ...] = ()
        for epoch in range(epochs) if all_epochs else sorted({e for e in trigger.moments(names, epochs) if e < epochs}):
            fired = trigger.fire(names, active_regions(names, trigger, 0, decisions), epoch, epochs, None)
            decisions += tuple(Decision(index=0, epoch=epoch, action=action, regions=regions) for action, regions in fired)
        asked[all_epochs] = list(decisions)
    assert asked[True] == asked[False]


@pytest.mark.parametrize(
    ("options", "steps"), [({}, [7, 8, 9, 11]), ({"t0": 0.0, "how": "linear"}, [0, 3, 6, 9]), ({"t0": 0.5}, [2, 3, 6, 9])]
)
def test_freezeout_fires_within_epochs(options: dict[str, Any], steps: list[int]) -> None:
    """In steps of a run of 2 epochs of 6; what has fired is never undone or repeated."""
    blocks = tuple(f"blocks.{i}" for i in range(4))
    plan = graphopt.compile(
        Small(drop=0.0),
        Freeze(select=blocks, when={"schedule": "freezeout", **options}),
        input=(3, 8, 8),
        verify="off",
        costs=False,
    )
    found = plan.foreseen(2)
    assert [step_at(d.epoch, 6) for d in found] == steps
    assert [d.regions for d in found] == [(name,) for name in blocks]
    assert not plan.due(2, None, 2, found)


def test_a_billion_epochs_are_foreseen_at_once() -> None:
    schedules = [{"epoch": 10**9 - 1}, {"schedule": "freezeout"}, {"schedule": "progressive"}]
    passes = [Freeze(select=("blocks.0", "blocks.1"), when=when) for when in schedules]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), verify="off", costs=False)
    started = time.process_time()
    assert {d.index for d in plan.foreseen(10**9)} == {0, 1, 2}
    assert time.process_time() - started < 1


def test_every_phase_that_can_be_foreseen_is_compiled_before_the_run() -> None:
    passes = [Supervise(modules=2), Drop(upto="layer1", when={"epoch": 2})]
    plan = graphopt.compile(build("resnet8"), passes, input=(3, 8, 8), verify="off", costs=False)
    plan.check_phases(2)  # the run ends before the phase that cannot be compiled
    with pytest.raises(PassError, match=r"pass 2, drop.*from epoch 2 on, "):
        plan.check_phases(3)
    with pytest.raises(PassError, match=r"pass 2, drop.*from epoch 2 on, "):
        plan.phases(3, verify="fast")
