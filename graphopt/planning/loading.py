"""How fast a spec's images come from its loader, and what that makes of each phase: whether the step or the loader binds."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.data.loader import Batch, ImageFeed, open_data
from graphopt.planning.run_cost import RunCost
from graphopt.spec import Spec

#: seconds for which batches are timed, after those that come while loader processes start
TIMED = 2.0
#: batches that are timed at least
FEWEST = 2


@dataclass(frozen=True)
class LoaderRate:
    """Images per second that the loader gives here.

    Attributes:
        images_per_second: where it decodes them. workers: its processes (0: the training process loads).
        kept: from the second epoch on, of images that stay decoded in memory after the first; None where each epoch decodes.
    """

    images_per_second: float
    workers: int
    kept: float | None = None

    def of_phase(self, epoch: float, epochs: float) -> float:
        """Images per second in most epochs of a phase: only the first epoch of a run decodes what is kept."""
        return self.images_per_second if self.kept is None or epoch + epochs <= 1 else self.kept


@dataclass(frozen=True)
class PhaseTime:
    """An epoch of a phase, in seconds.

    Attributes:
        epoch, epochs: the phase's start and its length, in epochs.
        step: of all steps. loading: of loading its images; 0 where it trains on cached features, None where the loader is not known.
        length: of the epoch: with loader processes the longer of both, without them their sum.
        binds: "step" or "loader", whichever takes longer; None where the loader is not known.
    """

    epoch: float
    epochs: float
    step: float
    loading: float | None
    length: float
    binds: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def loader_rate(spec: Spec, *, seconds: float = TIMED, now: Callable[[], float] = time.perf_counter) -> LoaderRate:
    """Times the training batches of a spec's own data for a moment.

    Args:
        seconds: for so long, but at least two batches. now: a clock.

    Raises RunError if the images are not here.
    """
    workers, train = spec.data.workers, spec.train
    feed = ImageFeed(open_data(spec.data, tuple(spec.backbone.input), train.seed).train, train.batch, seed=train.seed, workers=workers)
    # Only the first epoch decodes what is kept.
    batches = feed.batches(0) if feed.samples.kept else (batch for epoch in itertools.count() for batch in feed.batches(epoch))
    try:
        # What loader processes have prepared while they started would come at once.
        for _ in range(min(1 + 2 * workers, len(feed) - 1) if feed.samples.kept else 1 + 2 * workers):
            next(batches)
        decoded = _rate(batches, seconds, now)
        kept = (batch for _ in itertools.count() for batch in feed.remembered(0)) if next(feed.remembered(0), None) is not None else None
        return LoaderRate(decoded, workers, _rate(kept, seconds, now) if kept is not None else None)
    finally:
        feed.close()


def _rate(batches: Iterator[Batch], seconds: float, now: Callable[[], float]) -> float:
    """Images per second, of so many seconds or until there are no more."""
    start, images = now(), 0
    for number, batch in enumerate(batches, 1):
        images += len(batch.target)
        if number >= FEWEST and now() - start >= seconds:
            break
    return images / (now() - start)


def phase_times(cost: RunCost, batch: int, loader: LoaderRate | None) -> tuple[PhaseTime, ...]:
    """The epochs of each phase of a run whose steps of `batch` images were forecast with rates."""
    images = cost.samples // batch * batch
    found = []
    for phase in cost.phases:
        assert phase.seconds is not None
        loading = 0.0 if phase.feature_bytes else images / loader.of_phase(phase.epoch, phase.epochs) if loader is not None else None
        longer = max(phase.seconds, loading or 0.0)
        length = longer if loader is not None and loader.workers else phase.seconds + (loading or 0.0)
        binds = None if loading is None else "loader" if loading > phase.seconds else "step"
        found.append(PhaseTime(phase.epoch, phase.epochs, phase.seconds, loading, length, binds))
    return tuple(found)
