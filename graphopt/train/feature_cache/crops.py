"""Random crops of cached feature maps, in the place of random crops of images.

Where a prefix computes alike at every position, the map of a cropped image is a crop of the map of the whole one, up to its borders. So the
map of an image that is larger by the padding is cached, and each epoch takes another crop of it. The map of a flipped image is another map
(kernels are not symmetric): views of a sample hold both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.data.loader import Samples
from graphopt.data.randomness import mixed_seed
from graphopt.data.transforms import Transform
from graphopt.errors import RunError
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

    def drawn(self, epoch: int) -> Tensor:
        """(samples, 2) int64: where the crop of each sample begins in an epoch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, _STREAM))
        return torch.stack([torch.randint(room + 1, (self.samples,), generator=generator) for room in self.room], dim=1)

    def take(self, maps: Tensor, begin: Tensor) -> Tensor:
        """Crops (N, C, height, width) of maps (N, C, H, W)."""
        height, width = self.size
        crops = maps.new_empty(*maps.shape[:2], height, width)
        for crop, whole, (y, x) in zip(crops, maps, begin.tolist(), strict=True):
            crop.copy_(whole[:, y : y + height, x : x + width])
        return crops


def check_crops(samples: Samples, options: Mapping[str, Any]) -> None:
    """Raises RunError where crops of features cannot stand for the augmentation of images."""
    transform = samples.transform
    if not isinstance(transform, Transform) or transform.padded_crop is None:
        what = "features are cropped in the place of images that are padded and cropped, and these are not"
        raise RunError(what, where="data.augment.crop", fix='Set it to "pad", or leave crops out of the pass')
    needed = 2 ** len(transform.flips)
    if needed > 1 and not options.get("refresh") and (options.get("views") or 1) % needed:
        what = "the features of a flipped image are no flipped features of the image, so both have to be cached"
        raise RunError(what, where="data.augment", fix=f"Set views = {needed} in the pass, or refresh = 4")


def surrounded(samples: Samples, crops: Croppable, options: Mapping[str, Any]) -> Samples:
    """The samples as larger images, of which crops are taken later; of fixed views the first half are flipped, or a quarter in each way."""
    transform, refreshed = samples.transform, bool(options.get("refresh"))
    larger = transform.surrounded(*crops.pixels, flipped=refreshed)
    return samples.prepared(larger, deterministic=False, mirrors=() if refreshed else transform.flips)
