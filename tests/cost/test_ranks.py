"""The forecast of a step on several ranks: live bytes and messages equal those of real gloo ranks."""

import dataclasses
from functools import partial

import pytest
from torch import distributed, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from graphopt.cost import CostError, forecast, measure
from graphopt.cost.ranks import Collective, Parallel, fake_ranks
from tests.support.ranks import first_holds, run_ranks

INPUT = (3, 8, 8)


def network(*, frozen=False):
    """Above the limit of DDP's first bucket, with a norm and with sizes that no number of ranks divides."""
    convolution = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(*convolution, nn.Linear(7 * 36, 1201), nn.ReLU(), nn.Linear(1201, 5))
    network[0].requires_grad_(not frozen)
    return network


def sharded(module, ranks):
    with unset_fake_temporarily():
        mesh = init_device_mesh("cpu", (ranks,))
    for part in (module[0], module[4]):
        fully_shard(part, mesh=mesh)
    return fully_shard(module, mesh=mesh)


class kept_gradients:
    """Micro-batches but the last."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.module.set_requires_gradient_sync(False)

    def __exit__(self, *error):
        self.module.set_requires_gradient_sync(True)


def replicated(module):
    return DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)


def parallel(kind, ranks):
    if kind == "fsdp":
        return Parallel(ranks, partial(sharded, ranks=ranks), kept_gradients)
    return Parallel(ranks, replicated, DistributedDataParallel.no_sync)


def options(accumulate, way):
    """Of a step with two samples in each micro-batch."""
    return {"batch": 2 * accumulate, "accumulate": accumulate, "optimizer": "adamw", "parallel": way}


def figures(cost):
    """What depends on memory and messages; a real step calls an operator more or less."""
    apart = ("kernels", "moved_bytes", "rows", "peak_block_bytes", "peak_parts", "peak_activation_bytes")
    parts = dict(cost.peak_parts)
    parts["activation"] += parts.pop("gathered")  # a copy that gloo makes, unseen, is not known as one of a message
    return {f.name: getattr(cost, f.name) for f in dataclasses.fields(cost) if f.name not in apart} | {"parts": parts}


CASES = [(kind, frozen, accumulate) for kind in ("ddp", "fsdp") for frozen, accumulate in ((False, 1), (True, 1), (False, 4))]


def check(_rank, forecasts):
    for (kind, frozen, accumulate), expected in forecasts.items():
        given = options(accumulate, parallel(kind, distributed.get_world_size()))

        def equal(frozen=frozen, given=given, expected=expected):
            return figures(measure(network(frozen=frozen), INPUT, **given)) == expected

        assert first_holds(equal), (kind, frozen, accumulate)  # rank 0 has the largest shards


def test_equals_a_step_of_real_ranks():
    ranks = 3  # which divides no size
    forecasts = {}
    for kind, frozen, accumulate in CASES:
        way = Parallel.replicated(ranks) if kind == "ddp" else parallel(kind, ranks)
        forecasts[kind, frozen, accumulate] = figures(forecast(network(frozen=frozen), INPUT, **options(accumulate, way)))
    run_ranks(check, forecasts, ranks=ranks)


def test_a_ring_sends_what_is_not_a_ranks_own():
    gather, reduction, scatter = (Collective(name, 1, 1200) for name in ("all-gather", "all-reduce", "reduce-scatter"))
    assert [m.sent(3, "nccl") for m in (gather, reduction, scatter)] == [800, 1600, 800]
    assert scatter.sent(3, "gloo") == 1600, "gloo scatters what it has reduced as a whole"


def test_forecasts_of_ranks_need_a_process_of_their_own():
    with fake_ranks(2), pytest.raises(CostError, match="a process of several"):
        forecast(network(), INPUT, 2, parallel=Parallel.replicated(2))
    assert not distributed.is_initialized()
