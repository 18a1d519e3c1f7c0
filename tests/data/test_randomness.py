from __future__ import annotations

import random

import numpy as np
import torch

from graphopt.data.randomness import mixed_seed, preserved, reseed


def draws() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))


def test_draws_inside_leave_no_trace() -> None:
    reseed(3)
    expected = draws()
    reseed(3)
    with preserved():
        reseed(1, 2)
        inside = draws()
    assert draws() == expected
    with preserved():
        reseed(1, 2)
        assert draws() == inside != expected


def test_similar_numbers_give_unrelated_seeds() -> None:
    seeds = {mixed_seed(*parts) for parts in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
