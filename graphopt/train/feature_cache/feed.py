"""Training on cached features: their batches, and the part of the network that takes them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.data.loader import Batch, ImageFeed, epoch_order
from graphopt.train.feature_cache.store import CacheEntry

#: batches that are read ahead of the step
AHEAD = 2


class OnFeatures(nn.Module):
    """The part of a network that is trained on cached features. Without autocast it computes in float32."""

    def __init__(self, suffix: nn.Module) -> None:
        super().__init__()
        self.suffix = suffix

    def forward(self, features: Tensor, *more: Any) -> Any:
        """The output of the network for features of any dtype."""
        return self.suffix(features.float(), *more)


class FeatureFeed:
    """Training batches of cached features, in the order of the images' feed. A thread reads them ahead.

    The entry has the first of each sample's `views`, then all second ones, and so on.
    """

    def __init__(self, entry: CacheEntry, images: ImageFeed, views: int = 1) -> None:
        self.entry, self._images, self._views = entry, images, views
        self._count = entry.layout.rows // views

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Feed.batches`. A sample's views alternate from epoch to epoch."""
        images, size = self._images, self._images.batch
        order = torch.tensor(epoch_order(self._count, images.seed, epoch))[images.rank.number :: images.rank.count]

        def load(number: int) -> Batch:
            index = order[number * size : (number + 1) * size]
            rows = index + (epoch + index) % self._views * self._count
            features = self.entry.features.index_select(0, rows)
            return Batch(index, features.pin_memory() if images.pin else features, self.entry.targets[rows])

        with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
            ahead: deque[Future[Batch]] = deque()
            for number in range(start, len(self)):
                ahead.append(pool.submit(load, number))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
