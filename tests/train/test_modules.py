"""What a chain of ranks refuses before it starts, and how modules are assigned."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt import GraphoptError, Pass
from graphopt.cost import Rates
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.spec import OptimizerSpec
from graphopt.train.assignment import seconds_of
from graphopt.train.modules import Modular, check_modules, couples_parameters
from graphopt.train.ranks import Ranks
from tests.train import small

HALVES = (Supervise(cuts=["blocks.1"]),)

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "float16": ({"amp": "float16"}, 'does not train in float16.* Use amp = "bfloat16"'),
    "checkpoints in parts": ({"checkpoint_format": "sharded"}, 'rank 0 writes all of a checkpoint.* Use checkpoint_format = "whole"'),
    "synchronized norms": ({"replicas": 2, "sync_norm": True}, "synchronizes over all processes.* Leave sync_norm or replicas out"),
    "a common norm": ({"clip": 1.0}, 'does not clip by the norm of all gradients.* Use clip_mode = "module"'),
}
PLANS: dict[str, tuple[tuple[Pass, ...], dict[str, Any], str]] = {
    "no modules": ((), {}, "needs gradient-isolated modules, and this plan has none. Add a supervise pass"),
    "too many ranks": (HALVES, {}, "2 gradient-isolated modules for 3 processes. Start 2 processes"),
    "a shared weight": (
        (Supervise(cuts=["blocks.0", "blocks.1"]), Share(select="blocks.2")),
        {},
        r"blocks\.1\.conv\d\.weight changes in training, and is in module 2 and module 3",
    ),
    "an optimizer": ((Supervise(modules=3),), {"optimizer": {"name": "lamb"}}, "a step of lamb on a parameter depends on other parameters"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_couple_modules_are_refused(what: str) -> None:
    changes, message = SETTINGS[what]
    with pytest.raises(GraphoptError, match=message):
        Modular.of(small.settings(strategy="modules", **changes))


@pytest.mark.parametrize("what", PLANS)
def test_plans_that_do_not_divide_are_refused(what: str) -> None:
    passes, changes, message = PLANS[what]
    with pytest.raises(GraphoptError, match=message):
        check_modules(small.plan(passes), small.settings(strategy="modules", **changes), processes=3)


def test_replicas_divide_the_processes() -> None:
    check_modules(small.plan(HALVES), small.settings(strategy="modules", replicas=2), processes=4)
    strategy = Modular.of(small.settings(strategy="modules", replicas=2))
    for count in (2, 3):
        with pytest.raises(GraphoptError, match=f"{count} processes are no chains of two or more, 2 of them side by side. Start 4"):
            strategy.with_ranks(Ranks(0, count))


def test_modules_of_any_phase_count() -> None:
    """A spec that begins to supervise later has ranks with nothing to train until then."""
    check_modules(small.plan((Supervise(modules=2, when={"epoch": 1}),)), small.settings(), processes=2)


@pytest.mark.parametrize(("name", "couples"), [("sgd", False), ("adamw", False), ("lars", False), ("lamb", True)])
def test_optimizers_are_tried(name: str, couples: bool) -> None:
    assert couples_parameters(OptimizerSpec(name=name)) is couples


def test_what_rests_costs_less() -> None:
    """A frozen module has a forward only, so that its rank has room for another."""
    passes, frozen = (Supervise(cuts=["blocks.0", "blocks.1", "blocks.2"]),), (Freeze(select=["stem", "blocks.0"]),)
    rates = Rates(1e-10, 1e-10, 1e-6, 0.1, "cpu")
    training, frozen_first = (seconds_of(small.plan(p), small.settings(), rates) for p in (passes, passes + frozen))
    assert 0 < frozen_first[0] < training[0] / 2
    assert frozen_first[1:] == training[1:]
