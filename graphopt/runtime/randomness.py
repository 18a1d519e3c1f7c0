"""Random draws inside a network that do not depend on where its parts run.

A training loop sets two seeds for each forward: one that all ranks share, and the rank's own. From the shared one come the draws that
all ranks must do alike (to leave a branch out, say). From the other come dropout masks and the like: each locally supervised module draws
from a stream of its own, so that it draws the same in one process and in a process apart. Without a loop that sets seeds, everything
draws from torch's default generators, as it does anywhere.
"""

import hashlib
from collections.abc import Callable

import torch

_shared: Callable[[], int] | None = None
_own: int | None = None


def set_seeds(shared: Callable[[], int] | None, own: int | None) -> None:
    """Sets the seeds of the next forward, and begins the stream of its first module; None returns to torch's default generators.

    The shared one is worked out where something draws from it: few networks do.
    """
    global _shared, _own
    _shared, _own = shared, own
    begin_stream(0)


def begin_stream(number: int) -> None:
    """Begins the stream of module `number`: the default generators of all devices get a seed that is a function of it."""
    if _own is not None:
        seed = _mixed(f"{_own} stream {number}")
        torch.default_generator.manual_seed(seed)
        # torch.manual_seed also prepares devices that nothing has used yet, which takes sixty times as long.
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)


def shared_draw(key: str) -> float:
    """A number in [0, 1): a function of the shared seed and of `key`, the name of what draws. So a repeated forward draws it again."""
    if _shared is None:
        return float(torch.rand(()))
    return (_mixed(f"{_shared()} {key}") >> 10) / 2**53


def _mixed(text: str) -> int:
    """63 bits that are a function of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
