"""What triggers measure: one record per finished epoch, with the relative change of each scored region's weights."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

Regions = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch, counted from 0."""

    epoch: int
    metrics: dict[str, float]  # figures of metrics.jsonl (`train_loss`, `accuracy`, ...), numbers only
    #: of scored regions, `|w_e - w_(e-1)| / |w_(e-1)|` over all parameters, in float64; from zero, `inf` once they change, 0.0 before
    change: dict[str, float]


@dataclass
class History:
    """Epoch records in order, and the weights at the end of the last epoch, from which the next change is measured.

    Everything a trigger reads is in `state_dict()`, so that a resumed run decides as the uninterrupted one would have.
    Parameters are equal on all ranks, and so are these figures: they need no reduction.
    """

    records: list[EpochRecord] = field(default_factory=list)
    snapshot: dict[str, Tensor] = field(default_factory=dict)

    def change(self, region: str) -> list[float]:
        """The region's change per epoch, oldest first; epochs in which it was not scored are left out."""
        return [record.change[region] for record in self.records if region in record.change]

    def watch(self, regions: Regions, parameters: Mapping[str, Tensor]) -> None:
        """Takes missing snapshots (at the start of a run, or of regions that a new phase scores) and drops those not needed."""
        wanted = {name for names in regions.values() for name in names if name in parameters}
        copies = {name: parameters[name].detach().to("cpu", copy=True) for name in wanted - self.snapshot.keys()}
        self.snapshot = {name: self.snapshot[name] if name in self.snapshot else copies[name] for name in sorted(wanted)}

    def close(self, epoch: int, metrics: Mapping[str, float], regions: Regions, parameters: Mapping[str, Tensor]) -> EpochRecord:
        """Appends the record of `epoch`, measured from the last snapshot, and takes the next snapshot."""
        known = self.snapshot.keys() & parameters.keys()
        pairs = {region: [(self.snapshot[name], parameters[name]) for name in names if name in known] for region, names in regions.items()}
        change = {region: _relative_change(found) for region, found in pairs.items() if found}
        record = EpochRecord(epoch, dict(metrics), change)
        self.records.append(record)
        self.snapshot = {}
        self.watch(regions, parameters)
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records], "snapshot": self.snapshot}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls([EpochRecord(**record) for record in state["records"]], dict(state["snapshot"]))


def _relative_change(pairs: list[tuple[Tensor, Tensor]]) -> float:
    difference = before = 0.0
    for old, new in pairs:
        old64, new64 = old.double(), new.detach().to("cpu", torch.float64)
        difference += float((new64 - old64).square().sum())
        before += float(old64.square().sum())
    if before == 0.0:
        return math.inf if difference > 0.0 else 0.0
    return math.sqrt(difference / before)
