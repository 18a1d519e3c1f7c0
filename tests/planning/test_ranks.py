"""The forecast per rank: what a plan's phases need on several processes, and bad input."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import graphopt
from graphopt.cost import measure
from graphopt.data.loader import ImageFeed, open_data
from graphopt.errors import RunError
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.planning.ranks import forecast_ranks, sharded, trained_part
from graphopt.runtime.shards import local
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.fsdp import Sharded
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Strategy
from tests.support.backbones import Small
from tests.support.ranks import first_holds, run_ranks

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
    "drop": [Drop(upto="blocks.0", when="start", force=True)],
}
SHARDED = TRAIN.model_copy(update={"strategy": "fsdp", "accumulate": 2, "ema": 0.9})


def figures(step):
    sizes = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "saved_activation_bytes", "peak_bytes", "collectives")
    return {name: getattr(step, name) for name in sizes}


def plan_of(name):
    model = Small(drop=0.0, norm=partial(nn.GroupNorm, 2))
    return next(iter(graphopt.compile(model, PASSES[name], input=(3, 8, 8), verify="off", costs=False).phases(1))).plan


def stored(module):
    """Bytes of the storages of a module's tensors, of sharded ones this rank's."""
    storages = (local(tensor).untyped_storage() for tensor in (*module.parameters(), *module.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def exchanged_sizes(plan, ranks):
    """Bytes of each message of an epoch by which ranks give each other cached features."""
    samples = open_data(DataSpec(name="digits", train_limit=48, eval_limit=4), (3, 8, 8), 0).train
    images = ImageFeed(samples, SHARDED.batch, rank=ranks, accumulate=SHARDED.accumulate)
    strategy = Strategy(torch.device("cpu"), ranks=ranks)
    feed, _, record = FeatureCache(images, strategy, folder=Path("unused"), digest="", identity={}).prepare(plan, {})
    assert record["kept"]
    sizes, real = [], distributed.all_to_all_single
    distributed.all_to_all_single = lambda received, *more, **options: (sizes.append(received.nbytes), real(received, *more, **options))
    list(feed.batches(0))
    distributed.all_to_all_single = real
    return sizes


def check(rank, forecasts):
    ranks = Ranks.join(60).connected(torch.device("cpu"))
    for name, expected in forecasts.items():
        plan = plan_of(name)
        trained = trained_part(plan, None)
        options = {**SHARDED.forecast_options(), "targets": plan.needs.targets, "parallel": sharded(plan, SHARDED, 2, "gloo")}

        def equal(trained=trained, options=options, step=expected.step):
            return figures(measure(trained.module, trained.input, SHARDED.batch // 2, **options)) == figures(step)

        assert first_holds(equal), name  # rank 0 has the largest parts
        averages = copy.deepcopy(plan.module)
        Sharded.of(SHARDED).with_ranks(ranks).wrap_average(averages, plan)
        assert rank or stored(averages) == expected.kept.averages, name
        if expected.exchanged is not None:
            assert exchanged_sizes(plan, ranks) == [*expected.exchanged.sizes] * 8
            assert expected.exchanged.calls == SHARDED.accumulate


def test_fsdp_equals_real_ranks_for_every_pass():
    """Steps, averaged weights and the exchange of cached features."""
    forecasts = {name: forecast_ranks(plan_of(name), SHARDED, ranks=2, samples=48).phases[0] for name in PASSES}
    dropped = forecasts["drop"]
    assert dropped.feature_bytes == 24 * 8 * 8 * 8 * 4
    assert sum(dropped.peak_parts.values()) == dropped.peak_bytes > dropped.step.peak_bytes
    plan = plan_of("drop")
    assert dropped.kept.prefix + stored(plan.suffix) == stored(plan.module) == dropped.kept_alone.averages
    assert dropped.sent(2, "gloo") > sum(m.sent(2, "gloo") for m in dropped.step.collectives)
    run_ranks(check, forecasts)
