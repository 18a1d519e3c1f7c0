"""What changes while a run goes on, and what it amounts to at the end."""

from dataclasses import dataclass, field
from typing import Any, Self

import torch

from graphopt.compiler.plan import Plan
from graphopt.data.randomness import mixed_seed
from graphopt.train.evaluation import Meter
from graphopt.train.history import History
from graphopt.train.optimizer import named_parameters, parameter_counts
from graphopt.train.phase import Phase, RunContext, advance


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
        # From here on the model draws from a stream that compiling and verifying have not touched.
        torch.manual_seed(mixed_seed(spec.seed, 3))
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
    loss: float
    ema_accuracy: float | None  # of the averaged weights
    best_accuracy: float  # of the checkpoint in best.pt, by the better of its two sets of weights
    best_epoch: int  # from 0
    seconds: float  # training and evaluation, without interruptions
    peak_bytes: int  # allocated on the GPU, or resident in the process
    device: str
    parameters: int
    trainable_parameters: int
    phases: tuple[dict[str, Any], ...]
    folder: str

    @classmethod
    def of(cls, state: RunState, device: str, folder: str) -> Self:
        plan, progress, last = state.phase.plan, state.progress, state.history.records[-1].metrics
        return cls(
            name=plan.name,
            digest=plan.digest,
            epochs=progress.epoch,
            steps=progress.total,
            accuracy=last["accuracy"],
            loss=last["loss"],
            ema_accuracy=last.get("ema_accuracy"),
            best_accuracy=progress.best_accuracy,
            best_epoch=progress.best_epoch,
            seconds=progress.seconds,
            peak_bytes=progress.peak_bytes,
            device=device,
            **parameter_counts(plan.module),
            phases=tuple(state.phases),
            folder=folder,
        )
