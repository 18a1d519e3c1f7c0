"""The forecast per rank: what a plan's phases need on several processes, and bad input."""

from __future__ import annotations

import pytest

import graphopt
from graphopt.errors import RunError
from graphopt.passes.freeze import Freeze
from graphopt.planning.ranks import forecast_ranks
from graphopt.spec import TrainSpec
from tests.support.backbones import Small

TRAIN = TrainSpec(epochs=4, batch=12, device="cpu")


@pytest.fixture(scope="module")
def plan():
    frozen = Freeze(select=["stem", "blocks.0"], when={"epoch": 2})
    return graphopt.compile(Small(drop=0.0), [frozen], input=(3, 8, 8), verify="off", costs=False)


def trained_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def test_ddp_reduces_what_each_phase_trains(plan):
    cost = forecast_ranks(plan, TRAIN, ranks=3)
    assert (cost.strategy, cost.micro_batch, cost.backend) == ("ddp", 4, "gloo")
    trained = [trained_bytes(phase.plan.module) for phase in plan.phases(4)]
    assert [(p.epoch, p.epochs) for p in cost.phases] == [(0, 2), (2, 2)]
    for phase, size in zip(cost.phases, trained, strict=True):
        (message,) = phase.step.collectives
        assert (message.name, message.bytes, phase.step.gradient_bytes) == ("all-reduce", size, size)
        assert phase.sent(3, "gloo") == size * 4 // 3
        assert phase.step.peak_bytes < phase.alone.peak_bytes
    assert trained[1] < trained[0]
    table = cost.to_dict(link=1000)["phases"][0]
    assert table["link_seconds"] == table["sent_bytes"] / 1000
    assert sum(table["peak_parts"].values()) == table["peak_bytes"]


def test_one_process_has_no_messages(plan):
    cost = forecast_ranks(plan, TRAIN, ranks=1)
    assert cost.strategy == "single"
    assert not any(phase.step.collectives for phase in cost.phases)


@pytest.mark.parametrize(("ranks", "strategy", "says"), [(5, None, "Use 10 or 15"), (2, "single", "is one process, not 2")])
def test_what_ranks_cannot_do_is_refused(plan, ranks, strategy, says):
    with pytest.raises(RunError, match=says):
        forecast_ranks(plan, TRAIN, ranks=ranks, strategy=strategy)
