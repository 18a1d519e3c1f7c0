"""How good a network is on a split of a data set, and how fast: what `graphopt eval` reports."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.data.datasets import open_split
from graphopt.data.loader import ImageFeed, Samples, check_image
from graphopt.data.transforms import eval_transform
from graphopt.errors import RunError
from graphopt.spec import Spec
from graphopt.train.evaluation import evaluate
from graphopt.train.strategy import Strategy


@dataclass(frozen=True)
class Scores:
    """The figures of one evaluation.

    Attributes:
        loss: cross-entropy. top5_accuracy: of the five highest scores, or of all where there are fewer classes.
        seconds: of the whole evaluation, loading included. images_per_second: the same, as a rate.
        network_images_per_second: of the forward passes alone, after the first; None where there was only one.
        confusion: per class in the data, how often each class of the network had the highest score; None where it was not asked for.
    """

    data: str
    split: str
    samples: int
    batch: int
    device: str
    loss: float
    accuracy: float
    top5_accuracy: float
    seconds: float
    images_per_second: float
    network_images_per_second: float | None
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; classes only where there is a confusion matrix."""
        left_out = () if self.confusion is not None else ("classes", "confusion")
        return {key: value for key, value in asdict(self).items() if key not in left_out}


def score(module: nn.Module, spec: Spec, *, confusion: bool = False) -> Scores:
    """Evaluates a network on the split of the spec's data that `data.eval_split` names, with the spec's batch, device and precision.

    The module is moved to that device. Raises RunError for data that is missing or does not fit the network.
    """
    data, settings, shape = spec.data, spec.train, spec.backbone.input
    check_image(shape)
    split = open_split(data.name, data.root, data.eval_split)
    samples = Samples(split, data.eval_limit, eval_transform(data, shape), deterministic=True, seed=settings.seed)
    if not len(samples):
        raise RunError("there are no images to evaluate", where="data")
    strategy = Strategy.of(settings)
    feed = ImageFeed(samples, settings.batch, shuffle=False, workers=data.workers, pin=strategy.device.type == "cuda")
    strategy.to_device(module)
    timed, counts = _Timed(module, strategy), _Counts(len(split.classes))
    try:
        with strategy.kernels():
            start = time.perf_counter()
            meter = evaluate(timed, feed, strategy, len(split.classes), after_batch=counts.add if confusion else lambda *_: None)
            seconds = time.perf_counter() - start
    finally:
        feed.close()
    return Scores(
        data=data.name,
        split=data.eval_split,
        samples=meter.samples,
        batch=settings.batch,
        device=strategy.describe(),
        loss=meter.loss,
        accuracy=meter.accuracy,
        top5_accuracy=meter.top5_accuracy,
        seconds=seconds,
        images_per_second=meter.samples / seconds,
        network_images_per_second=timed.rate,
        classes=tuple(map(str, split.classes)),
        confusion=counts.table() if confusion else None,
    )


class _Timed(nn.Module):
    """A network that measures its forward passes, all but the first, which also warms up the device."""

    def __init__(self, body: nn.Module, strategy: Strategy) -> None:
        super().__init__()
        self.body, self._strategy = body, strategy
        self._calls = self._images = 0
        self._seconds = 0.0

    def forward(self, x: Tensor) -> Any:
        self._strategy.synchronize()
        start = time.perf_counter()
        output = self.body(x)
        self._strategy.synchronize()
        if self._calls:
            self._seconds += time.perf_counter() - start
            self._images += len(x)
        self._calls += 1
        return output

    @property
    def rate(self) -> float | None:
        return self._images / self._seconds if self._seconds else None


class _Counts:
    """A confusion matrix: a row per class in the data, a column per class of the network."""

    def __init__(self, classes: int) -> None:
        self.classes, self.counts = classes, torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, output: Tensor, target: Tensor) -> None:
        width = output.shape[1]
        if width > self.counts.shape[1]:  # a network may know more classes than the data has
            self.counts = torch.nn.functional.pad(self.counts, (0, width - self.counts.shape[1]))
        cells = target.cpu() * width + output.argmax(dim=1).cpu()
        self.counts += torch.bincount(cells, minlength=self.classes * width).view(self.classes, width)

    def table(self) -> tuple[tuple[int, ...], ...]:
        rows: Sequence[Sequence[int]] = self.counts.tolist()
        return tuple(map(tuple, rows))
