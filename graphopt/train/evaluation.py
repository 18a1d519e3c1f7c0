"""Loss and accuracy: of training steps, and of the full network as it is exported."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.data.loader import Batch, ImageFeed
from graphopt.errors import RunError
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Strategy


@dataclass
class Meter:
    """Sums of loss and correct predictions over samples, on the device, so that no step waits for them. NaN without samples.

    A meter has the samples of its own rank until `over` makes one of all ranks' samples.
    """

    samples: int = 0
    sums: Tensor | None = None

    def add(self, loss: Tensor, correct: Tensor, samples: int) -> None:
        """Adds `samples` samples: `loss` is their mean loss, `correct` how many predictions were right (both scalars)."""
        sums = torch.stack([loss.detach().double() * samples, correct.detach().double()])
        self.sums = sums if self.sums is None else self.sums + sums
        self.samples += samples

    def over(self, ranks: Ranks) -> "Meter":
        """The meter of all ranks' samples; all ranks have to call it."""
        if ranks.count == 1:
            return self
        samples, *sums = ranks.sum([self.samples, *(self.sums.tolist() if self.sums is not None else (0.0, 0.0))])
        return Meter(int(samples), torch.tensor(sums, dtype=torch.float64) if samples else None)

    @property
    def loss(self) -> float:
        return float(self.sums[0]) / self.samples if self.sums is not None else float("nan")

    @property
    def accuracy(self) -> float:
        return float(self.sums[1]) / self.samples if self.sums is not None else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "sums": None if self.sums is None else self.sums.tolist()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        sums = state["sums"]
        return cls(state["samples"], None if sums is None else torch.tensor(sums, dtype=torch.float64, device=device))


def evaluate(module: nn.Module, feed: ImageFeed, strategy: Strategy, classes: int, *, after_batch: Callable[[], None]) -> Meter:
    """Cross-entropy and accuracy over every sample of `feed`, on all ranks. `after_batch` may raise an exception to stop."""
    module.eval()
    meter = Meter()
    with torch.no_grad():
        for number, batch in enumerate(strategy.batches(_moved(feed, strategy), len(feed), training=False)):
            with strategy.autocast():
                output = strategy.infer(module, batch)
                if output is None:
                    continue
                output = output[0] if isinstance(output, tuple | list) else output
                check_output(output, batch.target, classes)
                loss = F.cross_entropy(output, batch.target)
            if feed.real(number):
                meter.add(loss, count_correct(output, batch.target), len(batch.target))
            after_batch()
    return meter.over(strategy.ranks)


def _moved(feed: ImageFeed, strategy: Strategy) -> Iterator[Batch]:
    yield from map(strategy.move, feed.batches(0))


def check_output(output: Any, target: Tensor, classes: int) -> None:
    """Raises RunError unless `output` is (N, at least `classes`)."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(target):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RunError(f"the runner trains classifiers with outputs (N, classes), the backbone gives {found}", where="backbone")
    if output.shape[1] < classes:
        what = f"the backbone has {output.shape[1]} classes, the data has {classes}"
        raise RunError(what, where="backbone.arguments", fix=f"Set num_classes = {classes}")


def count_correct(output: Tensor, target: Tensor) -> Tensor:
    """How many of (N, classes) scores have their maximum at the target (N,), or at the maximum of a soft target (N, classes)."""
    labels = target if target.ndim == 1 else target.argmax(dim=1)
    return (output.detach().argmax(dim=1) == labels).sum()
