"""The device model: rounding as documented, and never a figure that nobody measured."""

import pytest
import torch
from torch import nn

from graphopt.cost import CostError, forecast
from graphopt.cost.attribution import Attribution
from graphopt.cost.cuda import BLOCK, Device, on_device
from graphopt.cost.ledger import Ledger


@pytest.mark.parametrize(("size", "block"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**6, 1_000_448)])
def test_blocks_are_multiples_of_512_bytes(size, block):
    ledger = Ledger(Attribution())
    ledger.index(torch.empty(size, dtype=torch.uint8))
    assert ledger.peak(block=BLOCK)[0] == block


def test_every_storage_is_rounded():
    cost = forecast(nn.Linear(8, 4), (8,), 2, optimizer=None)
    assert cost.peak_block_bytes % 512 == 0
    assert cost.peak_bytes < cost.peak_block_bytes < cost.peak_bytes + 512 * 40
    assert on_device(cost).allocated_bytes == cost.peak_block_bytes


def test_an_uncalibrated_device_says_so_and_leaves_the_process_open():
    memory = on_device(forecast(nn.Linear(8, 4), (8,), 2))
    assert memory.state == "not calibrated"
    assert memory.process_bytes is None


def test_measured_terms_are_added():
    cost = forecast(nn.Linear(8, 4), (8,), 2)
    memory = on_device(cost, Device("some", context_bytes=1000, workspace_bytes=24, measured="a test"))
    assert memory.allocated_bytes == cost.peak_block_bytes + 24
    assert memory.process_bytes == memory.allocated_bytes + 1000
    assert memory.state == "calibrated: a test"


def test_a_calibrated_device_without_its_measurements_is_none():
    with pytest.raises(CostError):
        Device(measured="nowhere")
