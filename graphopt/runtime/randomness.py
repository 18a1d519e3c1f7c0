"""Random draws that decide which parts of a network run: the same on every rank, and the same when a forward is repeated.

A rank's ordinary generators give each rank its own dropout masks. What all ranks must do alike (leave a branch out, say) is drawn here
from a seed that the training loop sets for each forward. Without a loop that sets one, draws come from torch's default generator.
"""

import hashlib

import torch

_seed: int | None = None


def set_structure_seed(seed: int | None) -> None:
    """Sets the seed of this process's draws until the next call; None returns to torch's default generator."""
    global _seed
    _seed = seed


def structure_draw(key: str) -> float:
    """A number in [0, 1): a function of the seed and of `key`, the name of what draws."""
    if _seed is None:
        return float(torch.rand(()))
    digest = hashlib.blake2b(f"{_seed} {key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
