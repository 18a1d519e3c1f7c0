"""FreezeOut as published: every layer's iterations and learning rates, and phases that begin within an epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt import Pass
from graphopt.compiler.triggers import FreezeOut, LearningRate, RunSchedule
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.spec import OptimizerSpec, TrainSpec
from graphopt.train import Stopped, train
from graphopt.train.optimizer import Schedule, build_optimizer, load_optimizer_state, optimizer_state
from tests.train import small

BLOCKS = tuple(f"blocks.{i}" for i in range(4))
CUBIC = {"schedule": "freezeout", "t0": 0.5}


def published(layer: int, layers: int, how: str, t0: float, scaled: bool, iterations: int, peak: float) -> list[float]:
    """A layer's learning rates, restated from the paper: lr_i(t) = lr_i(0) / 2 * (1 + cos(pi t / t_i)), and frozen after t_i.

    arXiv 1706.04983, section 2; lr_i(0) is the peak, over t_i where learning rates are scaled. As the authors' code counts: iterations from
    0, layers from 0, and the head is layer L, which trains to the end.
    """
    time = {"linear": 1, "squared": 2, "cubic": 3}[how]
    end = (t0 + (1 - t0) * layer / layers) ** time
    last, rates = iterations * end, []
    for iteration in range(iterations):
        if iteration > last:
            break
        rates.append((peak / end if scaled else peak) * 0.5 * (1 + math.cos(math.pi * iteration / last)))
    return rates


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("how", "t0"), [("cubic", 0.8), ("squared", 0.5), ("linear", 0.5), ("cubic", 0.5)])
def test_iterations_and_rates_of_every_layer_are_those_published(how: str, t0: float, scale: bool) -> None:
    epochs, steps, peak = 10, 100, 0.1
    when = {"schedule": "freezeout", "how": how, "t0": t0, "scale": scale}
    plan = small.plan([Freeze(select=BLOCKS, when=when)])
    train_spec = TrainSpec.model_validate({"epochs": epochs, "optimizer": {"lr": peak}})
    optimizer = build_optimizer(plan.module, train_spec.optimizer, regions=plan.learning_rates)
    schedule = Schedule(optimizer, train_spec, steps, plan.learning_rates)
    found: dict[str, list[float]] = {name: [] for name in (*BLOCKS, "the head")}
    for step in range(epochs * steps):
        schedule.set_step(step)
        rates = {group.get("regions", ("the head",))[-1].split()[-1]: group["lr"] for group in optimizer.param_groups}
        for name, rate in rates.items():
            found["the head" if name == "head" else name].append(rate)
    freezes = {r: math.ceil(d.epoch * steps - 1e-9) for d in plan.foreseen(epochs) for r in d.regions or ()}
    for layer, name in enumerate(found):
        expected = published(layer, len(BLOCKS), how, t0, scale, epochs * steps, peak)
        live = found[name][: freezes.get(name, epochs * steps)]
        # An iteration at exactly t_i has the rate 0 there, and is left out here.
        assert len(expected) - len(live) in ((0, 1) if expected[-1] < 1e-9 else (0,)), name
        assert live == pytest.approx(expected[: len(live)], abs=1e-12), name
        assert not any(found[name][len(live) :])
        assert sum(live) == pytest.approx(sum(expected)), name
    if scale:
        total = peak * epochs * steps / 2
        assert all(sum(rates) == pytest.approx(total, rel=0.01) for rates in found.values()), "every layer goes as far"


def test_any_schedule_of_the_run_is_gone_through_and_weights_decay_with_the_rate() -> None:
    plan = small.plan([Freeze(select=BLOCKS[:1], when={"schedule": "freezeout", "how": "linear", "t0": 0.5})])
    spec = TrainSpec.model_validate(
        {"epochs": 4, "optimizer": {"name": "adamw", "lr": 1.0}, "scheduler": {"name": "step", "decay_epochs": 2}}
    )
    optimizer = build_optimizer(plan.module, spec.optimizer, regions=plan.learning_rates)
    schedule = Schedule(optimizer, spec, 10, plan.learning_rates)
    seen = []
    for step in (0, 9, 10, 19, 20, 39):
        schedule.set_step(step)
        seen.append({"regions" in g: g["lr"] for g in optimizer.param_groups})
    assert [rates[True] for rates in seen] == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.0, 0.0])
    assert [rates[False] for rates in seen] == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1, 0.1])
    before = plan.module.get_parameter("blocks.0.conv1.weight").detach().clone()
    plan.module(torch.rand(2, *small.SHAPE)).sum().backward()
    optimizer.step()
    assert torch.equal(before, plan.module.get_parameter("blocks.0.conv1.weight")), "no step and no decay at a rate of 0"


def test_without_annealing_the_runs_own_rate_holds() -> None:
    assert not small.plan([Freeze(select=BLOCKS, when={**CUBIC, "anneal": False})]).learning_rates.regions


class Slower(Pass):
    """Sets the learning rate of what it selects, and nothing else."""

    name = "slower"
    select: str
    factor: float

    def match(self, graph: Any) -> Any:
        from graphopt import Match
        from graphopt.ir.select import select

        return Match(select(self.select, graph))

    def rewrite(self, edit: Any, match: Any) -> Any:
        from graphopt import Effects

        return Effects()

    def learning_rates(self, names: tuple[str, ...]) -> dict[str, LearningRate]:
        def rate(time: float, schedule: RunSchedule) -> float:
            return self.factor * schedule(time)

        return dict.fromkeys(names, rate)


def test_any_pass_can_set_learning_rates_and_they_multiply() -> None:
    plan = small.plan([Slower(select="blocks.0", factor=0.5), Slower(select="blocks", factor=0.1), Freeze(select=BLOCKS[:1], when=CUBIC)])
    spec = TrainSpec.model_validate({"epochs": 8, "optimizer": {"lr": 1.0}, "scheduler": "constant"})
    optimizer = build_optimizer(plan.module, spec.optimizer, regions=plan.learning_rates)
    schedule = Schedule(optimizer, spec, 1, plan.learning_rates)

    def rates() -> dict[str, float]:
        names = {id(p): n for n, p in plan.module.named_parameters()}
        return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}

    assert schedule.set_step(0) == 1.0
    assert rates()["blocks.0.conv1.weight"] == pytest.approx(0.05 * 8)
    assert rates()["blocks.1.conv1.weight"] == pytest.approx(0.1)
    assert rates()["fc.weight"] == 1.0
    schedule.set_step(1)
    assert rates()["blocks.0.conv1.weight"] == 0.0


def test_a_rate_that_is_no_number_is_an_error() -> None:
    plan = small.plan([Slower(select="blocks.0", factor=1e308)])
    spec = TrainSpec.model_validate({"optimizer": {"lr": 1e30}})
    with pytest.raises(RunError, match=r"slower blocks\.0 at step 0 is inf"):
        Schedule(build_optimizer(plan.module, OptimizerSpec(), regions=plan.learning_rates), spec, 1, plan.learning_rates).set_step(0)


def test_groups_with_their_own_rates_are_saved_as_plain_values(tmp_path: Path) -> None:
    plan = small.plan([Freeze(select=BLOCKS, when=CUBIC)])
    optimizer = build_optimizer(plan.module, OptimizerSpec(), regions=plan.learning_rates)
    torch.save(optimizer_state(optimizer, plan.module), tmp_path / "state.pt")
    again = build_optimizer(plan.module, OptimizerSpec(), regions=plan.learning_rates)
    load_optimizer_state(again, plan.module, torch.load(tmp_path / "state.pt", weights_only=True))
    assert [g.get("regions") for g in again.param_groups] == [g.get("regions") for g in optimizer.param_groups]


#: 6 steps an epoch, 12 in all; t_i are 0.125, 0.244, 0.422 and 0.67 of them: all within an epoch
RUN: dict[str, Any] = {"epochs": 2, "ema": 0.9, "accumulate": 2, "batch": 16, "optimizer": {"name": "adamw", "lr": 0.01}, "log_every": 1}
STARTS = [0, 2, 3, 6, 9]


def go(folder: Path, after: int = 10**9, seed: int = 0) -> bool:
    plan = small.plan([Freeze(select=BLOCKS, when=CUBIC)], seed=seed)
    try:
        train(plan, folder, settings=small.settings(**RUN), data=small.interrupting(after), resume=True)
    except Stopped:
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert go(folder)
    return folder


def test_phases_begin_at_the_step(whole: Path) -> None:
    phases = small.records(whole, "phase")
    assert [p["step"] for p in phases] == STARTS
    ends = [FreezeOut.model_validate(CUBIC).end(i, 4) for i in range(4)]
    assert [p["decisions"][0]["epoch"] for p in phases[1:]] == pytest.approx([2 * end for end in ends])
    assert [p["decisions"][0]["regions"] for p in phases[1:]] == [[name] for name in BLOCKS]
    assert [r["epoch"] for r in small.records(whole, "epoch")] == [0, 1]


@pytest.mark.parametrize("after", [17, 33, 100, 130])
def test_stopped_at_or_between_those_steps_it_ends_where_the_uninterrupted_run_does(tmp_path: Path, whole: Path, after: int) -> None:
    assert not go(tmp_path, after)
    assert go(tmp_path, seed=7)
    assert small.same(small.weights(tmp_path), small.weights(whole))
    one, other = (torch.load(p / "last.pt", weights_only=True) for p in (tmp_path, whole))
    assert one["decisions"] == other["decisions"]
    assert small.same(one["phase"]["ema"], other["phase"]["ema"])


def test_a_network_is_as_it_was_without_regions() -> None:
    net = nn.Linear(2, 2)
    optimizer = build_optimizer(net, OptimizerSpec(lr=0.8))
    assert Schedule(optimizer, TrainSpec(epochs=2), 5).set_step(0) == optimizer.param_groups[0]["lr"] == 0.1
