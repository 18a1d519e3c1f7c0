"""Mixup and CutMix of batches, by timm."""

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
        same: dict[str, Any] = {"switch_prob": augment.mixup_switch_prob, "mode": augment.mixup_mode, "num_classes": classes}
        self._mixup: Any = Mixup(
            augment.mixup, augment.cutmix, augment.cutmix_minmax, augment.mixup_prob, label_smoothing=smoothing, **same
        )
        self._seed, self._off = seed, augment.mixup_off_epoch

    @classmethod
    def of(cls, augment: AugmentSpec, classes: int, smoothing: float, seed: int) -> Self | None:
        return cls(augment, classes, smoothing, seed) if augment.mixes else None

    def score(self, outputs: int) -> None:
        """Makes targets for a network of so many outputs, at least as many as the data has classes."""
        self._mixup.num_classes = outputs

    def __call__(self, batch: Batch, epoch: int, number: int) -> Batch:
        """The batch, mixed, with soft targets (N, classes), which it has in epochs without mixup too.

        Raises RunError for a batch of odd size, which timm cannot pair, and for images in which CutMix has no pixel to cut.
        """
        if len(batch.input) % 2:
            raise RunError(f"mixup pairs images, the batch has {len(batch.input)}", where="train.batch")
        with preserved():
            reseed(self._seed, epoch, number, 1)
            self._mixup.mixup_enabled = not self._off or epoch < self._off
            try:
                mixed, target = self._mixup(batch.input.clone(), batch.target)
            except ValueError as error:  # of NumPy, which draws from no number
                what = f"CutMix cannot cut images of {tuple(batch.input.shape[-2:])}: {error}"
                raise RunError(what, where="data.augment.cutmix_minmax", fix="Widen it, or leave it out") from error
        return Batch(batch.sample, mixed, target)
