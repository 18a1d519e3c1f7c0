"""Losses of a step whose labels have no values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import CostError
from graphopt.ir.shapes import tensors_in

#: a function of the module's output and the labels (N,)
Loss = Callable[[Any, Tensor], Tensor]


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    def one(logits: Tensor) -> Tensor:
        # Dense outputs (N, C, ...) take a label per position.
        labels = target if logits.ndim == 2 else target.view(-1, *[1] * (logits.ndim - 2)).expand(-1, *logits.shape[2:])
        return F.cross_entropy(logits, labels)

    return _over_outputs(one, output)


def _binary_cross_entropy(output: Any, _target: Tensor) -> Tensor:
    return _over_outputs(lambda logits: F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)), output)


def _over_outputs(loss: Callable[[Tensor], Tensor], output: Any) -> Tensor:
    """The sum of `loss` over every floating-point tensor of an output."""
    total: Tensor | None = None
    for logits in tensors_in(output):
        if logits.is_floating_point():
            total = loss(logits) if total is None else total + loss(logits)
    if total is None:
        what = f"the module returns {type(output).__name__}, which holds no tensor to take a loss of"
        raise CostError(what, fix="Pass `loss=`, a function")
    return total


LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "binary_cross_entropy": _binary_cross_entropy}
