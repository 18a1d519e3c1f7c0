"""Gradients are recorded, whatever mode the caller is in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recording() -> Iterator[None]:
    """Records gradients inside, even where the caller has turned that off (`torch.no_grad`, `torch.inference_mode`)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
