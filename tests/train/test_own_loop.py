"""Phases in a loop of one's own: they begin when triggers say, state goes on by name, and a stop in between changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt import Phases
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.spec import TrainSpec
from graphopt.train.optimizer import Schedule, build_optimizer
from graphopt.train.region_rates import RegionRates
from tests.train.loops import BATCHES, cosine, freeze, plan, same, sgd, train


def test_phases_begin_as_the_triggers_say_and_momentum_goes_on() -> None:
    phases = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    assert train(phases, range(1)) == [False]
    weights = {name: value.clone() for name, value in phases.module.state_dict().items()}
    assert phases.optimizer is not None
    momentum = {n: phases.optimizer.state[p]["momentum_buffer"].clone() for n, p in phases.module.named_parameters()}
    phases.optimizer.param_groups[0]["lr"] = 0.01  # as a schedule would
    assert phases.begin(1)
    assert same(weights, phases.module.state_dict())
    assert phases.optimizer.param_groups[0]["lr"] == 0.01
    named = dict(phases.module.named_parameters())
    assert not named["stem.weight"].requires_grad
    assert torch.equal(phases.optimizer.state[named["fc.weight"]]["momentum_buffer"], momentum["fc.weight"])
    assert train(phases, range(1, 3)) == [False, False], "begun already"
    trained = phases.plan.export_state()
    assert torch.equal(trained["stem.weight"], weights["stem.weight"])
    assert not torch.equal(trained["fc.weight"], weights["fc.weight"])


def test_triggers_by_score_are_measured() -> None:
    phases = Phases(plan(freeze({"score": "change", "below": 1e9, "patience": 1})), sgd, epochs=4)
    began = train(phases, range(4))
    assert not began[0], "nothing is measured before the first epoch"
    assert any(began)


def test_a_phase_within_an_epoch_begins_before_its_step() -> None:
    made = plan(freeze({"schedule": "freezeout", "t0": 0.25, "how": "linear", "anneal": False}))
    assert made.moments(2) == (0.5, 1.25)
    assert train(Phases(made, sgd, epochs=2), range(2), steps=True) == [False, True, False, True]
    with pytest.raises(RunError, match="within an epoch"):
        Phases(made, sgd, epochs=2).begin(0)


@pytest.mark.parametrize("how", ["cubic", "linear"])
def test_learning_rates_that_passes_set_are_those_of_the_runner(how: str) -> None:
    made = plan(freeze({"schedule": "freezeout", "t0": 0.5, "how": how}))
    spec = TrainSpec.model_validate({"epochs": 4, "optimizer": {"name": "momentum", "lr": 0.0625}, "scheduler": {"name": "cosine"}})
    runners = build_optimizer(made.module, spec.optimizer, regions=made.learning_rates)
    schedule = Schedule(runners, spec, len(BATCHES), made.learning_rates)
    own = torch.optim.SGD(made.module.parameters(), lr=0.0625)
    rates = RegionRates(own, made.module, made.learning_rates, schedule._share)
    seen = set()
    for step in range(4 * len(BATCHES)):
        schedule.set_step(step)
        rates.set(step / (4 * len(BATCHES)))
        expected, found = ({p: g["lr"] for g in o.param_groups for p in g["params"]} for o in (runners, own))
        assert found == expected
        seen |= set(expected.values())
    assert len(seen) > 2 * 4


def test_they_are_followed_through_phases() -> None:
    phases = Phases(plan(freeze({"schedule": "freezeout", "t0": 0.5, "scale": False})), sgd, epochs=4, schedule=cosine)
    began, rates = [], []
    for epoch in range(4):
        for step in range(len(BATCHES)):
            began.append(phases.begin(epoch, step, steps=len(BATCHES)))
            assert phases.optimizer is not None
            rates.append({name: group["lr"] for group in phases.optimizer.param_groups for name in names(phases, group)})
    assert sum(began) == 2
    # t_i of the two regions: (1/2)^3 and (3/4)^3 of the run, of eight steps.
    for step, found in enumerate(rates):
        for region, end in (("stem.weight", 1 / 8), ("blocks.0.conv1.weight", 27 / 64)):
            assert found[region] == pytest.approx(0.05 * cosine(min(step / 8 / end, 1)), abs=1e-12)
        assert found["fc.weight"] == 0.05 * cosine(step / 8)


def names(phases: Phases, group: dict[str, Any]) -> list[str]:
    held = {id(p) for p in group["params"]}
    return [name for name, p in phases.module.named_parameters() if id(p) in held]


def test_without_a_schedule_there_is_nothing_that_they_are_relative_to() -> None:
    made = plan(freeze({"schedule": "freezeout", "t0": 0.5}))
    with pytest.raises(RunError, match=r"sets the learning rate of 1 freeze stem.*schedule"):
        Phases(made, sgd, epochs=2)
    with pytest.raises(RunError, match="follows a schedule"):
        Phases(made, sgd, epochs=2, schedule=cosine).begin(0)


def test_a_stop_changes_nothing() -> None:
    whole = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    train(whole, range(3))
    first = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    train(first, range(2))
    state = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, first.state_dict())
    again = Phases(plan(freeze({"epoch": 1})), sgd, epochs=3)
    again.load_state_dict(state)
    train(again, range(2, 3))
    assert same(whole.module.state_dict(), again.module.state_dict())


def test_what_was_frozen_must_not_have_moved() -> None:
    passes = [freeze("start"), Freeze.model_validate({"select": "blocks.1", "when": {"epoch": 1}})]
    phases = Phases(plan(*passes), sgd, epochs=2)
    with torch.no_grad():
        phases.module.get_parameter("stem.weight").add_(1)
    with pytest.raises(RunError, match=r"frozen, but changed during the phase: .*stem\.weight"):
        phases.begin(1)
