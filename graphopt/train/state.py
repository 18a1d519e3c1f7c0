"""What changes while a run goes on, what triggers measure of it, and what it amounts to at the end."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from graphopt.compiler.plan import Plan
from graphopt.runtime.shards import whole
from graphopt.train.evaluation import Meter
from graphopt.train.optimizer import named_parameters, parameter_counts
from graphopt.train.phase import Phase, RunContext, advance
from graphopt.train.similarity import moved

Regions = Mapping[str, tuple[str, ...]]


#: evaluations before a pass is applied whose falls of accuracy are usual
USUAL = 5


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch, counted from 0."""

    epoch: int
    metrics: dict[str, float]  # figures of metrics.jsonl (`train_loss`, `accuracy`, ...), numbers only
    #: of scored regions, `|w_e - w_(e-1)| / |w_(e-1)|` over all parameters, in float64; from zero, `inf` once they change, 0.0 before
    change: dict[str, float]
    size: str = ""  # of the network's input; accuracies at two sizes are not compared
    #: of regions whose outputs are compared, how far they have moved since the epoch before, `inf` in the first one and where the size
    #: of the input was another (`graphopt.train.similarity`)
    plasticity: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """Epoch records in order, and the weights and similarities at the end of the last epoch, from which the next change is measured.

    Everything a trigger reads is in `state_dict()`, so that a resumed run decides as the uninterrupted one would have.
    """

    records: list[EpochRecord] = field(default_factory=list)
    snapshot: dict[str, Tensor] = field(default_factory=dict)
    similar: dict[str, Tensor] = field(default_factory=dict)

    def change(self, region: str) -> list[float]:
        """The region's change per epoch, oldest first; epochs in which it was not scored are left out."""
        return [record.change[region] for record in self.records if region in record.change]

    def plasticity(self, region: str) -> list[float]:
        """How far the region's outputs have moved per epoch, oldest first; epochs in which it was not compared are left out."""
        return [record.plasticity[region] for record in self.records if region in record.plasticity]

    def figures(self, name: str) -> list[float]:
        """A figure per epoch at the present size, oldest first; `"loss"` is that of the evaluation data. Epochs without it are left out."""
        same = itertools.takewhile(lambda record: record.size == self.records[-1].size, reversed(self.records))
        return [record.metrics[name] for record in same if name in record.metrics][::-1]

    def fell(self, by: float, since: float) -> bool:
        """Whether an evaluation from epoch `since` on was lower, by more than `by` (0 to 1), than the best before it at that size.

        Accuracy goes up and down by itself while the learning rate is high: `by` is on top of the most that it fell in the `USUAL`
        evaluations before `since`, or in the first ones of a pass that has been there from the start. A fall also counts where two
        evaluations in a row were lower than the best, and the next one would be too low if it falls as the second did.
        """
        best, size, last, falls = -math.inf, "", -math.inf, list[float]()
        for record in self.records:
            if record.size != size:
                best, size, last, falls = -math.inf, record.size, -math.inf, []
            found = max((record.metrics[name] for name in ("accuracy", "ema_accuracy") if name in record.metrics), default=None)
            if found is None:
                continue
            fall = best - found
            expected = fall + max(0.0, last - found) if last < best else fall
            if record.epoch < since or (since == 0 and len(falls) < USUAL):
                falls.append(fall)
            elif expected > by + max([0.0, *falls[-USUAL:]]):
                return True
            best, last = max(best, found), found
        return False

    def watch(self, regions: Regions, parameters: Mapping[str, Tensor]) -> None:
        """Takes missing snapshots (at the start of a run, or of regions that a new phase scores) and drops those not needed.

        Weights to which a phase has given another shape are measured from there on.
        """
        wanted = sorted({name for names in regions.values() for name in names if name in parameters})
        kept = {name: self.snapshot[name] for name in wanted if name in self.snapshot}
        kept = {name: snapshot for name, snapshot in kept.items() if snapshot.shape == parameters[name].shape}
        missing = [name for name in wanted if name not in kept]
        copies = {name: whole(parameters[name]).detach().to("cpu", copy=True) for name in missing}
        self.snapshot = {name: kept[name] if name in kept else copies[name] for name in wanted}

    def close(
        self,
        epoch: int,
        metrics: Mapping[str, float],
        regions: Regions,
        parameters: Mapping[str, Tensor],
        size: str = "",
        similar: Mapping[str, Tensor] | None = None,
    ) -> EpochRecord:
        """Appends the record of `epoch`, measured from the last snapshot, and takes the next snapshot.

        `similar` are the similarities of regions whose outputs are compared; those of images of another size are not.
        """
        known = self.snapshot.keys() & parameters.keys()
        pairs = {region: [(self.snapshot[name], parameters[name]) for name in names if name in known] for region, names in regions.items()}
        change = {region: _relative_change(found) for region, found in pairs.items() if found}
        same = bool(self.records) and self.records[-1].size == size
        record = EpochRecord(epoch, dict(metrics), change, size, moved(self.similar if same else {}, similar or {}))
        self.records.append(record)
        self.snapshot, self.similar = {}, dict(similar or {})
        self.watch(regions, parameters)
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records], "snapshot": self.snapshot, "similar": self.similar}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls([EpochRecord(**record) for record in state["records"]], dict(state["snapshot"]), dict(state.get("similar", {})))


def _relative_change(pairs: list[tuple[Tensor, Tensor]]) -> float:
    difference = before = 0.0
    for old, new in pairs:
        old64, new64 = old.double(), whole(new).detach().to("cpu", torch.float64)
        difference += float((new64 - old64).square().sum())
        before += float(old64.square().sum())
    if before == 0.0:
        return math.inf if difference > 0.0 else 0.0
    return math.sqrt(difference / before)


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0
    step: int = 0  # optimizer steps done in the epoch
    total: int = 0  # optimizer steps done in the run
    seconds: float = 0.0
    epoch_began: float = 0.0  # `seconds` at the start of the epoch
    peak_bytes: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    weights: str = "model"  # which were better at the last evaluation, "model" or "ema" (the averaged ones)


@dataclass
class RunState:
    """Everything that changes while a run goes on; checkpoints store all of it."""

    phase: Phase
    progress: Progress = field(default_factory=Progress)
    history: History = field(default_factory=History)
    phases: list[dict[str, Any]] = field(default_factory=list)  # number, first epoch and step, and the decisions that began it
    meter: Meter = field(default_factory=Meter)  # of the current epoch
    window: Meter = field(default_factory=Meter)  # since the last record of steps

    @classmethod
    def initial(cls, plan: Plan, context: RunContext) -> Self:
        history, spec = History(), context.spec
        due = plan.due(0, history, spec.epochs)
        state = cls(Phase(advance(plan, due, spec.seed, 0) if due else plan, context), history=history)
        state.watch()
        return state

    def watch(self) -> None:
        """Lets the history measure the regions that the current phase scores."""
        plan = self.phase.plan
        self.history.watch(plan.scored, named_parameters(plan.module))


@dataclass(frozen=True)
class Summary:
    """The result of a finished run; also `summary.json`. Accuracy and loss are the full network's after the last epoch."""

    name: str
    digest: str
    epochs: int
    steps: int
    accuracy: float
    top5_accuracy: float
    loss: float
    ema_accuracy: float | None  # of the averaged weights
    best_accuracy: float  # of the checkpoint in best.pt, by the better of its two sets of weights
    best_epoch: int  # from 0
    seconds: float  # training and evaluation, without interruptions
    peak_bytes: int  # allocated on the GPU, or by which the process grew; of the rank that needs most
    device: str
    parameters: int
    trainable_parameters: int
    phases: tuple[dict[str, Any], ...]  # each with the forecast of its step
    data: str  # digest of the images and targets of both splits
    versions: dict[str, str]  # of what computes a step
    spec: dict[str, Any] | None  # every key of it; None for a plan compiled by hand
    folder: str

    @classmethod
    def of(cls, state: RunState, device: str, folder: str, data: str, versions: Mapping[str, str]) -> Self:
        plan, progress, last = state.phase.plan, state.progress, state.history.records[-1].metrics
        figures: dict[str, Any] = {name: last.get(name) for name in ("accuracy", "top5_accuracy", "loss", "ema_accuracy")}
        figures |= {name: getattr(progress, name) for name in ("best_accuracy", "best_epoch", "seconds", "peak_bytes")}
        figures |= parameter_counts(plan.module)
        figures |= {"name": plan.name, "digest": plan.digest, "device": device, "folder": folder, "phases": tuple(state.phases)}
        figures |= {"spec": plan.spec.resolved() if plan.spec is not None else None, "data": data, "versions": dict(versions)}
        return cls(epochs=progress.epoch, steps=progress.total, **figures)
