"""Cached features on several ranks: each rank owns those of every so-many-th sample, and hands them to the rank whose batch they are in.

What one number of ranks has left on disk, another number deals again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from graphopt.data.loader import Rank
from graphopt.train.feature_cache.store import CacheEntry
from graphopt.train.ranks import Ranks


def owned(rank: Rank, samples: int) -> range:
    """The samples whose features a rank owns: r, r + count, ... Alone, all of them."""
    return range(rank.number, samples, rank.count)


class Deal:
    """Rows of the entries that another number of ranks has filled, by view and sample."""

    def __init__(self, parts: Sequence[CacheEntry], views: int) -> None:
        self._parts, self._owned = parts, [part.layout.rows // views for part in parts]

    def rows(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Features and targets of (view, sample), in this order."""
        count, layout = len(self._parts), self._parts[0].layout
        view, sample = torch.tensor(keys).unbind(1)
        features, targets = torch.empty(len(keys), *layout.shape, dtype=layout.dtype), torch.empty(len(keys), dtype=torch.int64)
        for number, part in enumerate(self._parts):
            where = (sample % count == number).nonzero().view(-1)
            rows = sample[where] // count + view[where] * self._owned[number]
            features[where], targets[where] = part.features.index_select(0, rows), part.targets[rows]
        return features, targets


class Exchange:
    """Collective transfers on a process group of their own, because a thread makes them while the step reduces gradients.

    All ranks have to make it, and to call it as often. No file system is shared.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._group = ranks, ranks.new_group()

    def batch(self, wanted: Sequence[Tensor], features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features and targets of this rank's batch, in its order.

        Args:
            wanted: per rank, the samples of its batch, int64; all ranks know them, because the order is a function of seed and epoch.
            features, targets: what this rank owns of all of them: of the first rank's batch, then of the second's, and so on.
        """
        me, count, mine = self._ranks.number, self._ranks.count, wanted[self._ranks.number]
        rows = torch.cat([_bytes(features), _bytes(targets)], dim=1)
        sent = [int((samples % count == me).sum()) for samples in wanted]
        owner = mine % count
        received = rows.new_empty(len(mine), rows.shape[1])
        distributed.all_to_all_single(received, rows, torch.bincount(owner, minlength=count).tolist(), sent, group=self._group)
        # They come sorted by owner; the sort keeps the order of the batch among those of one owner.
        ordered = torch.empty_like(received)
        ordered[torch.sort(owner, stable=True).indices] = received
        values, labels = ordered[:, :-8].contiguous(), ordered[:, -8:].contiguous()  # a target has 8 bytes
        return values.view(features.dtype).view(len(mine), *features.shape[1:]), labels.view(torch.int64).view(-1)

    def trial(self, features: Tensor) -> None:
        """Exchanges as many rows as a batch has, evenly; to measure how long that takes."""
        rows = _bytes(features[: len(features) // self._ranks.count * self._ranks.count])
        distributed.all_to_all_single(torch.empty_like(rows), rows, group=self._group)


def _bytes(rows: Tensor) -> Tensor:
    """(N, bytes) uint8."""
    width = rows.shape[1:].numel() if rows.ndim > 1 else 1
    return rows.contiguous().view(len(rows), width).view(torch.uint8)
