"""Phases in a loop of one's own: they begin when triggers say, state goes on by name, and a stop in between changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt import Phases
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from tests.train.loops import freeze, plan, same, sgd, train


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


def test_learning_rates_that_passes_set_are_for_the_built_in_runner() -> None:
    with pytest.raises(RunError, match=r"sets the learning rate of 1 freeze stem.*graphopt train"):
        Phases(plan(freeze({"schedule": "freezeout", "t0": 0.5})), sgd, epochs=2)


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
