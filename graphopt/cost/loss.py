"""What a forecast step computes its loss with, and in which dtype."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import CostError
from graphopt.ir.shapes import tensors_in
from graphopt.runtime.dtypes import AUTOCAST_DTYPES

#: a function of the module's output and the labels (N,)
Loss = Callable[[Any, Tensor], Tensor]


def autocast(amp: str | None) -> AbstractContextManager[Any]:
    """The context of a step on the CPU with this dtype of autocast. Raises CostError for a dtype that there is not."""
    if amp is not None and amp not in AUTOCAST_DTYPES:
        raise CostError(f"amp is one of {', '.join(map(repr, AUTOCAST_DTYPES))} or None, found {amp!r}")
    return torch.autocast("cpu", dtype=AUTOCAST_DTYPES[amp]) if amp else nullcontext()


LOSSES: dict[str, Loss] = {
    # Dense outputs (N, C, ...) take a label per position.
    "cross_entropy": lambda logits, y: F.cross_entropy(logits, y.view(-1, *[1] * (logits.ndim - 2)).expand(-1, *logits.shape[2:])),
    "binary_cross_entropy": lambda logits, _: F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)),
}


def criterion(loss: str | Loss) -> Loss:
    """The loss; a named one is added up over every floating-point tensor of an output."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise CostError(f"loss is one of {', '.join(map(repr, LOSSES))} or a function, found {loss!r}")

    def added(output: Any, target: Tensor) -> Tensor:
        losses = (LOSSES[loss](logits, target) for logits in tensors_in(output) if logits.is_floating_point())
        first = next(losses, None)
        if first is None:
            what = f"the module returns {type(output).__name__}, which holds no tensor to take a loss of"
            raise CostError(what, fix="Pass `loss=`, a function")
        return sum(losses, first)

    return added
