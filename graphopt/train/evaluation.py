"""Accuracy of the full network, as it will be exported."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.data.loader import ImageFeed
from graphopt.train.metrics import Meter
from graphopt.train.phase import check_output, right_answers
from graphopt.train.strategy import Strategy


def evaluate(
    module: nn.Module,
    feed: ImageFeed,
    strategy: Strategy,
    classes: int,
    *,
    each: Callable[[], None] = lambda: None,
) -> Meter:
    """Cross-entropy and accuracy over every sample of `feed`. Leaves the module in eval mode.

    Args:
        each: called after each batch; may raise to stop.
    """
    module.eval()
    meter = Meter()
    with torch.no_grad():
        for batch in feed.batches(0):
            batch = strategy.move(batch)
            with strategy.autocast():
                answer = module(batch.input)
                output = answer[0] if isinstance(answer, tuple | list) else answer
                check_output(output, batch.target, classes)
                loss = F.cross_entropy(output, batch.target)
            meter.add(loss, right_answers(output, batch.target), len(batch.target))
            each()
    return meter
