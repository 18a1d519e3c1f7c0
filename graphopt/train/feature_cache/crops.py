"""Random crops of cached feature maps, in the place of random crops of images.

Where a prefix computes alike at every position, the map of a cropped image is a crop of the map of the whole one, up to its borders. So the
map of an image that is larger by the padding is cached, and each epoch takes another crop of it. The map of a flipped image is another map
(kernels are not symmetric): views of a sample hold both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.data.loader import Samples
from graphopt.data.randomness import mixed_seed
from graphopt.ir.shifts import Croppable

#: keeps its draws apart from the order of an epoch
_STREAM = 1


@dataclass(frozen=True)
class Crops:
    """Crops of the size (height, width) of maps, which are larger by some positions (rows, columns); drawn by seed, epoch and sample."""

    size: tuple[int, int]
    room: tuple[int, int]
    samples: int
    seed: int

    def of(self, epoch: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of maps (N, C, H, W) and the numbers of their samples (N,): the crops (N, C, height, width) that an epoch takes."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, _STREAM))
        begin = torch.stack([torch.randint(room + 1, (self.samples,), generator=generator) for room in self.room], dim=1)
        height, width = self.size

        def crop(maps: Tensor, samples: Tensor) -> Tensor:
            found = maps.new_empty(*maps.shape[:2], height, width)
            for part, whole, (y, x) in zip(found, maps, begin[samples].tolist(), strict=True):
                part.copy_(whole[:, y : y + height, x : x + width])
            return found

        return crop


def surrounded(samples: Samples, crops: Croppable, options: Mapping[str, Any]) -> Samples:
    """The samples as larger images, of which crops are taken later; of fixed views every second one is flipped, or three of every four."""
    transform, refreshed = samples.transform, bool(options.get("refresh"))
    larger = transform.surrounded(*crops.pixels, flipped=refreshed)
    return samples.prepared(larger, deterministic=False, mirrors=() if refreshed else transform.flips)
