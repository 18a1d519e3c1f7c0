"""Pixels of samples that are the same in every epoch, kept in the training process, so that they are decoded once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Memory:
    """Pixels (C, H, W) uint8 and targets of `count` samples, by their numbers. It takes memory as it is filled.

    Args:
        normalized: from pixels (N, C, H, W) uint8 to what a network takes.
    """

    def __init__(self, count: int, normalized: Callable[[Tensor], Tensor]) -> None:
        self.normalized = normalized
        self._present = [False] * count
        self._pixels: Tensor | None = None  # (count, C, H, W)
        self._targets = torch.zeros(count, dtype=torch.int64)

    def __contains__(self, number: int) -> bool:
        return self._present[number]

    def put(self, numbers: Tensor, pixels: Tensor, targets: Tensor) -> None:
        """Takes samples: (N,) int64, (N, C, H, W) uint8, (N,) int64."""
        if self._pixels is None:
            self._pixels = torch.empty((len(self._present), *pixels.shape[1:]), dtype=torch.uint8)  # pages come when they are written
        self._pixels[numbers], self._targets[numbers] = pixels, targets
        for number in numbers.tolist():
            self._present[number] = True

    def take(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Samples that it has, as a batch: numbers, normalised pixels, targets."""
        assert self._pixels is not None
        rows = torch.tensor(numbers)
        return rows, self.normalized(self._pixels[rows]), self._targets[rows]
