"""Mixup and CutMix, which make new images of a batch's."""

from typing import Any, Self

from timm.data import Mixup  # type: ignore[attr-defined]  # re-exported without saying so

from graphopt.data.loader import Batch
from graphopt.data.randomness import preserved, reseed
from graphopt.errors import RunError
from graphopt.spec import AugmentSpec


class Mixer:
    """timm's mixup and CutMix, seeded by (seed, epoch, batch number).

    Images are paired within a micro-batch of one process: other than everything else, who is mixed with whom depends on the number of
    processes, and on `accumulate`.
    """

    def __init__(self, augment: AugmentSpec, classes: int, smoothing: float, seed: int) -> None:
        self._mixup: Any = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=classes)
        self._seed = seed

    @classmethod
    def of(cls, augment: AugmentSpec, classes: int, smoothing: float, seed: int) -> Self | None:
        return cls(augment, classes, smoothing, seed) if augment.mixup or augment.cutmix else None

    def __call__(self, batch: Batch, epoch: int, number: int) -> Batch:
        """The batch, mixed, with soft targets (N, classes). Raises RunError for a batch of odd size, which timm cannot pair."""
        if len(batch.input) % 2:
            raise RunError(f"mixup pairs images, the batch has {len(batch.input)}", where="train.batch")
        with preserved():
            reseed(self._seed, epoch, number, 1)
            mixed, target = self._mixup(batch.input.clone(), batch.target)
        return Batch(batch.sample, mixed, target)
