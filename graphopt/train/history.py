"""What the triggers may look at: one record per finished epoch, and how far each scored region's weights moved in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Regions = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: counted from 0.
        metrics: what metrics.jsonl says of it (`train_loss`, `accuracy`, ...), numbers only.
        change: scored region -> `|w_e - w_(e-1)| / |w_(e-1)|` over all its parameters, L2 norms in float64. A region whose
            weights were zero gives `inf` once it moves, 0.0 while it does not.
    """

    epoch: int
    metrics: dict[str, float]
    change: dict[str, float]


@dataclass
class History:
    """Epoch records in order, plus the weights at the end of the last epoch that the next change is measured from.

    Everything a trigger reads is in `state_dict()`, so that a resumed run decides what the uninterrupted one would have.
    Parameters are equal on all ranks, and so are these figures: no reduction is needed for them.
    """

    records: list[EpochRecord] = field(default_factory=list)
    snapshot: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def change(self, region: str) -> list[float]:
        """The region's change per epoch, oldest first; epochs in which it was not scored are left out."""
        return [record.change[region] for record in self.records if region in record.change]

    def metric(self, name: str) -> list[float]:
        """One metric per epoch, oldest first; epochs without it are left out."""
        return [record.metrics[name] for record in self.records if name in record.metrics]

    def watch(self, regions: Regions, parameters: Mapping[str, Tensor]) -> None:
        """Snapshot what has no snapshot yet (start of a run, or a region that a new phase begins to score); drop the rest."""
        wanted = {name for names in regions.values() for name in names if name in parameters}
        self.snapshot = {name: self.snapshot[name] if name in self.snapshot else _copy(parameters[name]) for name in sorted(wanted)}

    def close(self, epoch: int, metrics: Mapping[str, float], regions: Regions, parameters: Mapping[str, Tensor]) -> EpochRecord:
        """Append the record of `epoch`, measured from the last snapshot, and take the next snapshot."""
        change = {}
        for region, names in regions.items():
            known = [name for name in names if name in self.snapshot and name in parameters]
            if known:
                change[region] = _relative_change([(self.snapshot[name], parameters[name]) for name in known])
        record = EpochRecord(epoch, dict(metrics), change)
        self.records.append(record)
        self.snapshot = {}
        self.watch(regions, parameters)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors only (loads with `weights_only=True`)."""
        records = [{"epoch": r.epoch, "metrics": r.metrics, "change": r.change} for r in self.records]
        return {"records": records, "snapshot": self.snapshot}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """The inverse of `state_dict()`."""
        return cls([EpochRecord(**record) for record in state["records"]], dict(state["snapshot"]))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _relative_change(pairs: list[tuple[Tensor, Tensor]]) -> float:
    moved = before = 0.0
    for old, new in pairs:
        old64, new64 = old.double(), new.detach().to("cpu", torch.float64)
        moved += float((new64 - old64).square().sum())
        before += float(old64.square().sum())
    if before == 0.0:
        return math.inf if moved > 0.0 else 0.0
    return math.sqrt(moved / before)
