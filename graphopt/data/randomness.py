"""Random generators: seeds that are functions of several numbers, and states that are restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; similar numbers give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(*parts: int, of_torch: bool = True) -> None:
    """Seeds every CPU generator that an augmentation may draw from with a function of `parts`; torch's only with `of_torch`."""
    seed = mixed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if of_torch:
        torch.default_generator.manual_seed(seed)


@contextmanager
def preserved() -> Iterator[None]:
    """Restores the CPU random state on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
