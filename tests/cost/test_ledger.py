"""Sizes of storages as an allocator counts them."""

import pytest
import torch
from torch import nn

from graphopt.cost import forecast, measure
from graphopt.cost.attribution import Attribution
from graphopt.cost.ledger import Ledger
from graphopt.cost.step import BLOCK


@pytest.mark.parametrize(("size", "block"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**6, 1_000_448)])
def test_blocks_of_an_allocator_are_multiples_of_512_bytes(size, block):
    ledger = Ledger(Attribution())
    ledger.index(torch.empty(size, dtype=torch.uint8))
    assert ledger.peak(block=BLOCK)[0] == block


def test_every_storage_is_rounded_up_to_a_block():
    cost = forecast(nn.Linear(8, 4), (8,), 2, optimizer=None)
    assert cost.peak_block_bytes % 512 == 0
    assert cost.peak_bytes < cost.peak_block_bytes < cost.peak_bytes + 512 * 40


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_squared_error_keeps_the_memory_of_all_squares(reduction):
    def loss(output, _):
        squared = torch.nn.functional.mse_loss(output, torch.zeros_like(output), reduction=reduction)
        return squared.sum() + (2 * output).exp().sum()

    found, real = (take(nn.Linear(4, 64), (4,), 8, loss=loss) for take in (forecast, measure))
    assert (found.peak_bytes, found.peak_parts) == (real.peak_bytes, real.peak_parts)
