"""How fast a spec's images come from its loader, and what that makes of each phase: whether the step or the loader binds."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.data.loader import ImageFeed, open_data
from graphopt.planning.run_cost import RunCost
from graphopt.spec import Spec

#: seconds for which batches are timed, after those that come while loader processes start
TIMED = 2.0
#: batches that are timed at least
FEWEST = 2


@dataclass(frozen=True)
class LoaderRate:
    """Images per second that the loader gives here, with so many processes of its own (0: the training process loads)."""

    images_per_second: float
    workers: int


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
    batches = _endless(feed)
    try:
        # What loader processes have prepared while they started would come at once.
        for _ in range(1 + 2 * workers):
            next(batches)
        start, images = now(), 0
        for number in itertools.count(1):
            images += len(next(batches).target)
            if number >= FEWEST and now() - start >= seconds:
                break
        taken = now() - start
    finally:
        feed.close()
    return LoaderRate(images / taken, workers)


def _endless(feed: ImageFeed) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from feed.batches(epoch)


def phase_times(cost: RunCost, batch: int, loader: LoaderRate | None) -> tuple[PhaseTime, ...]:
    """The epochs of each phase of a run whose steps of `batch` images were forecast with rates."""
    images = cost.samples // batch * batch
    found = []
    for phase in cost.phases:
        assert phase.seconds is not None
        loading = 0.0 if phase.feature_bytes else images / loader.images_per_second if loader is not None else None
        longer = max(phase.seconds, loading or 0.0)
        length = longer if loader is not None and loader.workers else phase.seconds + (loading or 0.0)
        binds = None if loading is None else "loader" if loading > phase.seconds else "step"
        found.append(PhaseTime(phase.epoch, phase.epochs, phase.seconds, loading, length, binds))
    return tuple(found)
