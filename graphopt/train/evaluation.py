"""Loss and accuracy: of training steps, and of the full network as it is exported."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch, ImageFeed
from graphopt.errors import RunError
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Strategy

#: what a meter sums: the criterion's loss, the local losses of passes, and how many samples' classes had the highest score, or one of
#: the five highest
SUMS = ("loss", "local", "correct", "top5")


@dataclass
class Meter:
    """Sums over samples, on the device, so that no step waits for them; their means are NaN without samples.

    A meter has the samples of its own rank until `over` makes one of all ranks' samples.
    """

    samples: int = 0
    sums: Tensor | None = None  # one of each of SUMS

    @staticmethod
    def sums_of(**sums: Tensor) -> Tensor:
        """Scalars by the names of SUMS as (4,) float64; what is not given is zero."""
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(sums.values())).device)
        return torch.stack([sums[name].detach().double() if name in sums else zero for name in SUMS])

    def add(self, samples: int, sums: Tensor) -> None:
        """Adds the sums over `samples` samples, made by `sums_of`."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.samples += samples

    def over(self, ranks: Ranks) -> "Meter":
        """The meter of all ranks' samples; all ranks have to call it."""
        if ranks.count == 1:
            return self
        samples, *sums = ranks.sum([self.samples, *(self.sums.tolist() if self.sums is not None else (0.0,) * len(SUMS))])
        return Meter(int(samples), torch.tensor(sums, dtype=torch.float64) if samples else None)

    def _mean(self, name: str) -> float:
        return float(self.sums[SUMS.index(name)]) / self.samples if self.sums is not None else float("nan")

    @property
    def loss(self) -> float:
        """Of the criterion, the mean over samples, without local losses."""
        return self._mean("loss")

    @property
    def local_loss(self) -> float:
        """The sum of all local losses, the mean over samples."""
        return self._mean("local")

    @property
    def accuracy(self) -> float:
        """The share of predictions that were right."""
        return self._mean("correct")

    @property
    def top5_accuracy(self) -> float:
        """The share of samples whose class had one of the five highest scores; counted in evaluation only."""
        return self._mean("top5")

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "sums": None if self.sums is None else self.sums.tolist()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        sums = state["sums"]
        return cls(state["samples"], None if sums is None else torch.tensor(sums, dtype=torch.float64, device=device))


def evaluate(
    module: nn.Module, feed: ImageFeed, strategy: Strategy, classes: int, *, after_batch: Callable[[Tensor, Tensor], None]
) -> Meter:
    """Cross-entropy and accuracy over every sample of `feed`, on all ranks.

    `after_batch` gets each batch's scores (N, at least `classes`) and targets (N,); it may raise an exception to stop.
    """
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
                samples = len(batch.target)
                correct, top5 = (count_correct(output, batch.target, among) for among in (1, 5))
                meter.add(samples, Meter.sums_of(loss=loss.double() * samples, correct=correct, top5=top5))
            after_batch(output, batch.target)
    return meter.over(strategy.ranks)


def _moved(feed: ImageFeed, strategy: Strategy) -> Iterator[Batch]:
    yield from map(strategy.move, feed.batches(0))


def traced_output(plan: Plan) -> Any:
    """What a plan's backbone returned when it was traced, the first of several outputs: scores (N, classes), of a classifier."""
    output = plan.base.fx.output_node().args[0]
    first = output[0] if isinstance(output, tuple | list) and output else output
    value = first.meta["val"] if isinstance(first, torch.fx.Node) else first
    return value[0] if isinstance(value, tuple | list) and value else value


def check_output(output: Any, target: Tensor, classes: int) -> None:
    """Raises RunError unless `output` is (N, at least `classes`)."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(target):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RunError(f"the runner trains classifiers with outputs (N, classes), the backbone gives {found}", where="backbone")
    if output.shape[1] < classes:
        what = f"the backbone has {output.shape[1]} classes, the data has {classes}"
        raise RunError(what, where="backbone.arguments", fix=f"Set num_classes = {classes}")


def count_correct(output: Tensor, target: Tensor, among: int = 1) -> Tensor:
    """How many of (N, classes) scores have the target (N,), or the maximum of a soft target (N, classes), among their highest."""
    labels = target if target.ndim == 1 else target.argmax(dim=1)
    if among == 1:
        return (output.detach().argmax(dim=1) == labels).sum()
    return (output.detach().topk(min(among, output.shape[1]), dim=1).indices == labels[:, None]).sum()
