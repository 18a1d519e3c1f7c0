"""The way of a chain's activations from rank to rank: from device to device by NCCL, or through the hosts' memory by gloo."""

from collections import defaultdict
from typing import NamedTuple, Self

import torch
from torch import distributed

from graphopt.train.ranks import Ranks


class Transport(NamedTuple):
    """Where the bytes of tensors lie while they travel, and what carries them.

    Attributes:
        device: this rank's, or the CPU. backend: of groups that carry nothing else; None: they travel with the heads of their messages.
        why: the reason why tensors of a CUDA device do not go from device to device.
    """

    device: torch.device = torch.device("cpu")
    backend: str | None = None
    why: str = ""

    @classmethod
    def of(cls, device: torch.device, ranks: Ranks) -> Self:
        """Device to device where all ranks can do that. All of them have to call it; `device` is where this one trains."""
        if device.type != "cuda":
            return cls()
        if not distributed.is_nccl_available():
            return cls(why="this torch has no NCCL")
        by_device = defaultdict[str, list[int]](list)
        for rank, identity in enumerate(ranks.gather(str(torch.cuda.get_device_properties(device).uuid))):
            by_device[identity].append(rank)
        for sharing in by_device.values():
            if len(sharing) > 1:
                return cls(why=f"ranks {' and '.join(map(str, sharing))} share one device, which NCCL refuses")
        return cls(device, "nccl")

    def describe(self) -> str:
        """For the run's summary; empty where nothing has to be said."""
        if self.backend is not None:
            return f"activations by {self.backend}"
        return f"activations through the host's memory: {self.why}" if self.why else ""
