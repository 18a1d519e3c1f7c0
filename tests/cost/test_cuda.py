"""The memory of a step on a GPU: the terms that CUDA adds, and the history of a few steps."""

import json

import pytest
from torch import nn

from graphopt.cost import CostError, forecast
from graphopt.cost.allocator import GRANULE, MIB, OutOfMemory
from graphopt.cost.devices import DEVICES, GIB, find_device
from graphopt.cost.history import usage
from graphopt.cost.ranks import Parallel

A100, H100 = DEVICES["A100"], DEVICES["H100"]


def network():
    convolutions = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def cost():
    return forecast(network(), (3, 32, 32), 64, optimizer="adamw", device=A100)


def terms(cost):
    return {term.name: term for term in cost.cuda.terms}


def test_bounds_are_ordered_and_above_what_is_live(cost):
    memory = cost.cuda
    for band in (memory.allocated, memory.reserved, memory.capacity):
        assert band.low <= band.high
    assert cost.peak_block_bytes <= memory.allocated.low <= memory.capacity.low <= memory.reserved.low
    assert memory.capacity.low % GRANULE == 0


def test_terms_say_how_they_are_known(cost):
    known = terms(cost)
    assert known["cuDNN workspace"].basis == "band"
    batch, rows = 64, 32 * 32
    # A convolution's operands: input, weight, output.
    assert known["cuDNN workspace"].bytes == (0, 4 * (batch * 64 * rows * 2 + 64 * 64 * 9))
    assert known["cuBLAS workspace"].bytes == (8_519_680, 2 * 8_519_680)
    assert known["optimizer's temporary results"].basis == "exact"
    assert all(term.why for term in cost.cuda.terms)


def test_hopper_has_larger_workspaces(cost):
    hopper = forecast(network(), (3, 32, 32), 64, optimizer="adamw", device=H100)
    assert terms(hopper)["cuBLAS workspace"].bytes == (32 * MIB, 64 * MIB)
    assert hopper.cuda.reserved.low > cost.cuda.reserved.low


def test_the_first_step_makes_the_state_and_later_ones_copy_their_batch(cost):
    history = cost.cuda.least
    live, most = set(), 0
    for event in history.events:
        (live.discard if event < 0 else live.add)(~event if event < 0 else event)
        most = max(most, sum(1 for i in live if history.sizes[i] == 4 * 64 * 3 * 1024))
    assert most == 2, "the next batch is there before the last one goes"
    left = sum(history.sizes[i] for i in live if history.sizes[i] < 8_519_680)
    assert left == cost.parameter_bytes + cost.optimizer_bytes - 6 * 4 + cost.input_bytes, "counters of the optimizer stay on the CPU"


def test_it_fits_where_its_upper_bound_does(cost):
    memory = cost.cuda
    assert memory.fits(memory.capacity.high)
    assert not memory.fits(memory.capacity.high - GRANULE)
    assert memory.fits()
    with pytest.raises(OutOfMemory):
        usage(memory.most, memory.capacity.high - GRANULE)


def test_json_has_figures_and_bands(cost):
    plain = json.loads(json.dumps(cost.to_dict()))
    assert plain["peak_reserved_bytes"] == plain["cuda"]["reserved_band_bytes"][0] == cost.cuda.reserved.low
    assert plain["capacity_bytes"] == plain["cuda"]["capacity_band_bytes"][0]
    assert plain["cuda"]["device"] == "A100"
    assert "cuda" not in forecast(network(), (3, 32, 32), 2).to_dict()


def test_a_step_of_a_rank_has_its_buckets():
    alone, one = (forecast(network(), (3, 8, 8), 2, device=A100, parallel=p) for p in (None, Parallel.replicated(2, backend="nccl")))
    assert one.cuda.allocated.low >= alone.cuda.allocated.low + alone.gradient_bytes // 2


def test_a_frozen_network_has_no_optimizer():
    cost = forecast(network().requires_grad_(False), (3, 8, 8), 2, device=A100)
    assert cost.cuda.reserved.low >= cost.peak_bytes
    assert "optimizer's temporary results" not in terms(cost)


@pytest.mark.parametrize(
    ("name", "device"), [("h100", "H100"), ("NVIDIA A100", "A100"), ("GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090")]
)
def test_devices_are_found_by_name(name, device):
    assert find_device(name).name == device


def test_an_unknown_device_is_refused():
    with pytest.raises(CostError, match=r"no device is called 'H10'. Did you mean 'H100'"):
        find_device("H10")
    with pytest.raises(CostError, match=r"Known are A100, H100, H200, RTX 4090, L4"):
        find_device("?")


def test_a_context_is_less_than_the_memory():
    for device in DEVICES.values():
        assert 20 * GIB < device.usable < device.memory
        assert device.source
