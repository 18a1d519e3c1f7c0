"""Accuracy of the full network, as it is exported."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.data.loader import ImageFeed
from graphopt.errors import RunError
from graphopt.train.metrics import Meter
from graphopt.train.strategy import Strategy


def evaluate(module: nn.Module, feed: ImageFeed, strategy: Strategy, classes: int, *, after_batch: Callable[[], None]) -> Meter:
    """Cross-entropy and accuracy over every sample of `feed`. Leaves the module in eval mode.

    Args:
        after_batch: called after each batch; may raise an exception to stop.
    """
    module.eval()
    meter = Meter()
    with torch.no_grad():
        for batch in feed.batches(0):
            batch = strategy.move(batch)
            with strategy.autocast():
                output = module(batch.input)
                output = output[0] if isinstance(output, tuple | list) else output
                check_output(output, batch.target, classes)
                loss = F.cross_entropy(output, batch.target)
            meter.add(loss, count_correct(output, batch.target), len(batch.target))
            after_batch()
    return meter


def check_output(output: Any, target: Tensor, classes: int) -> None:
    """Raises RunError unless `output` is (N, at least `classes`)."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(target):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RunError(f"the runner trains classifiers with outputs (N, classes), the backbone gives {found}", where="backbone")
    if output.shape[1] < classes:
        raise RunError(
            f"the backbone has {output.shape[1]} classes, the data has {classes}",
            where="backbone.arguments",
            fix=f"Set num_classes = {classes}",
        )


def count_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many of (N, classes) scores have their maximum at the target (N,), or at the maximum of a soft target (N, classes)."""
    labels = target if target.ndim == 1 else target.argmax(dim=1)
    return (output.detach().argmax(dim=1) == labels).sum()
