"""The forecast of a chain of ranks: who trains what, how long a step takes, and what is sent."""

from __future__ import annotations

import pytest

import graphopt
from graphopt.cost.rates import Rates
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.planning.modules import ChainCost, forecast_chain
from graphopt.spec import TrainSpec
from tests.support.backbones import Small

RATES = Rates(1e-10, 1e-10, 1e-6, 0.1, "cpu")
TRAIN = TrainSpec(epochs=4, batch=8, device="cpu")


@pytest.fixture(scope="module")
def plan() -> graphopt.Plan:
    passes = [Supervise(modules=3), Freeze(select=["stem", "blocks.0"], when={"epoch": 2})]
    return graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), verify="off", costs=False)


@pytest.fixture(scope="module")
def cost(plan: graphopt.Plan) -> ChainCost:
    return forecast_chain(plan, TRAIN, ranks=2, rates=RATES)


def test_runs_of_modules_are_assigned_anew_in_each_phase(cost: ChainCost) -> None:
    assert [(p.epoch, p.epochs) for p in cost.phases] == [(0, 2), (2, 2)]
    for phase in cost.phases:
        assert [r.rank for r in phase.ranks] == [1, 0]
        assert [n for r in phase.ranks for n in r.modules] == [0, 1, 2]
    assert sum(r.seconds for r in cost.phases[1].ranks) < sum(r.seconds for r in cost.phases[0].ranks), "a frozen module rests"


def test_the_slowest_rank_decides_and_links_may(cost: ChainCost) -> None:
    phase = cost.phases[0]
    slowest = max(r.seconds for r in phase.ranks)
    assert phase.step_seconds() == slowest
    assert phase.fill_seconds == pytest.approx(sum(r.seconds for r in phase.ranks) - slowest)
    assert phase.step_seconds(link=1) == phase.ranks[0].sent_bytes
    assert slowest < phase.alone.seconds < 1.02 * sum(r.seconds for r in phase.ranks)
    assert max(r.held_bytes for r in phase.ranks) < phase.alone.held_bytes


def test_activations_losses_numbers_and_classes_of_samples_are_sent(cost: ChainCost) -> None:
    first, last = cost.phases[0].ranks
    assert first.sent_bytes == 8 * (4 * 8 * 8 * 8 + 8 + 8) + 4 * len(first.modules)
    assert (first.messages, last.messages, last.sent_bytes) == (1, 0, 0)
    assert (first.link_bytes, last.link_bytes) == (first.sent_bytes, 2 * first.sent_bytes)


def test_as_plain_values(cost: ChainCost) -> None:
    found = cost.to_dict(link=1)
    assert (found["strategy"], found["ranks"], found["batch"]) == ("modules", 2, 8)
    phase = found["phases"][0]
    assert [n for rank in phase["chain"] for n in rank["modules"]] == [1, 2, 3]
    assert phase["images_per_second"] == 8 / phase["step_seconds"]
    assert phase["step_seconds"] == phase["chain"][0]["sent_bytes"]


def test_micro_batches_are_sent_one_by_one(plan: graphopt.Plan, cost: ChainCost) -> None:
    train = TRAIN.model_copy(update={"accumulate": 4, "epochs": 1})
    (phase,), (whole, _) = forecast_chain(plan, train, ranks=2, rates=RATES).phases, cost.phases
    first = phase.ranks[0]
    assert (first.messages, first.step.batch) == (4, 8)
    assert first.sent_bytes == whole.ranks[0].sent_bytes + 3 * 4 * len(first.modules)
    assert first.held_bytes < whole.ranks[0].held_bytes
    assert phase.fill_seconds < whole.fill_seconds


def test_chains_side_by_side_are_each_that_of_their_share(plan: graphopt.Plan) -> None:
    one, several = (TRAIN.model_copy(update={"epochs": 1, **more}) for more in ({"batch": TRAIN.batch // 2}, {"replicas": 2}))
    (half,), (both,) = (forecast_chain(plan, t, ranks=n, rates=RATES).phases for t, n in ((one, 2), (several, 4)))
    assert both.ranks == half.ranks
    assert both.alone.step.batch == 2 * half.alone.step.batch


def test_one_rank_is_one_process(plan: graphopt.Plan) -> None:
    (phase,) = forecast_chain(plan, TRAIN.model_copy(update={"epochs": 1}), ranks=1, rates=RATES).phases
    assert phase.ranks == (phase.alone,)
    assert (phase.fill_seconds, phase.ranks[0].messages) == (0, 0)


def test_more_ranks_than_modules_are_refused(plan: graphopt.Plan) -> None:
    with pytest.raises(RunError, match="3 gradient-isolated modules for 4 processes"):
        forecast_chain(plan, TRAIN, ranks=4, rates=RATES)


def test_weights_that_an_earlier_module_follows_are_sent_back() -> None:
    passes = [Supervise(cuts=["blocks.0"], decoder="none", lookahead={"blocks": 1})]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), verify="off", costs=False)
    train = TRAIN.model_copy(update={"epochs": 1, "accumulate": 2})
    first, last = forecast_chain(plan, train, ranks=2, rates=RATES).phases[0].ranks
    followed = sum(p.nbytes for name, p in plan.module.named_parameters() if name.startswith("blocks.1."))
    assert (last.messages, last.sent_bytes) == (1, followed)
    assert first.messages == 2
