"""A compiled plan on its way through a run: the runner's phases, optimizer and schedule, a few steps in each phase."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.spec import TrainSpec
from graphopt.testing.steps import gradients, require, step
from graphopt.train.loop import Phases
from graphopt.train.optimizer import Schedule, optimizer_of

#: steps of an epoch, and those that a phase trains before it is checked
STEPS = 2
#: A small rate: with frozen norms that have seen no image, a fresh network's gradients are large.
OPTIMIZER = {"name": "adamw", "lr": 1e-4}
#: what decides for triggers that measure: takes the plan and the epoch
Decide = Callable[[Plan, int], Sequence[Decision]]


class CheckedRun:
    """A run of a plan that is checked in each of its phases.

    Attributes:
        start: the plan in its first phase.
        phases: where the run is. earlier: the plan in the phase before this one.
        resumed: a run that goes on from `saved`, from the phase before.
        saved: a checkpoint after the steps of the phase. copied: a copy of the module at that moment.
        loss, gradients: of one more step from there, taken by the module itself.
    """

    def __init__(self, start: Plan, epochs: int) -> None:
        self.settings = TrainSpec.model_validate({"epochs": epochs, "optimizer": OPTIMIZER})
        self.start = start
        self.phases = self._follow(start, verify="full")
        self.resumed = self._follow(start.advance_to(start.decisions, verify="off"))
        self.earlier: Plan | None = None
        self.saved: dict[str, Any] = {}
        self.copied: nn.Module = start.module
        self.loss, self.gradients = 0.0, dict[str, Tensor | None]()
        self.done = 0

    @property
    def plan(self) -> Plan:
        """The plan in its current phase."""
        return self.phases.plan

    def _follow(self, plan: Plan, **options: Any) -> Phases:
        """The phases of a plan from where it is, each with the optimizer that the runner would make."""
        phases: Phases | None = None

        def make(_: nn.Module) -> torch.optim.Optimizer:
            return optimizer_of(plan if phases is None else phases.plan, self.settings.optimizer)

        phases = Phases(plan, make, epochs=self.settings.epochs, sets_rates=True, **options)
        return phases

    def each_phase(self, decide: Decide | None = None) -> Iterator[float]:
        """Goes from phase to phase, and yields the epoch with which each begins. `decide` may add decisions of its own.

        Raises:
            PassError, VerifyError: a phase cannot be compiled.
            RunError: the state of the phase before does not fit, or what was frozen has moved.
        """
        for epoch in range(self.settings.epochs):
            for number in range(STEPS):
                earlier, self.done = self.plan, epoch * STEPS + number
                new = self.phases.begin(epoch, number, steps=STEPS)
                own = decide(self.plan, epoch) if decide is not None and not number else ()
                if own:
                    new |= self.phases.begin(epoch, steps=STEPS, decisions=own)
                if new or not self.done:
                    self.earlier = earlier if self.done else None
                    yield epoch + number / STEPS

    def train(self) -> str:
        """Trains the phase by two steps; takes a checkpoint, and computes the loss and the gradients of a third. The losses, as text.

        Raises Problem if a trainable parameter gets no finite gradient, or another one gets any.
        """
        module, losses = self.phases.module, list[float]()
        for seed in range(STEPS):
            losses.append(step(self.plan, module, seed))
            self._check_gradients()
            self.update(self.phases)
        self.saved = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.phases.state_dict())
        self.copied = copy.deepcopy(module)
        self.loss = step(self.plan, module, STEPS)
        self.gradients = gradients(module)
        return "losses " + ", ".join(f"{loss:.4g}" for loss in losses)

    def update(self, phases: Phases) -> None:
        """The optimizer's step, with the learning rates of the run's schedule."""
        assert phases.optimizer is not None
        Schedule(phases.optimizer, self.settings, STEPS, phases.plan.learning_rates).set_step(self.done)
        phases.optimizer.step()

    def _check_gradients(self) -> None:
        for name, parameter in self.phases.module.named_parameters():
            if not parameter.requires_grad:
                require(parameter.grad is None, f"{name} is frozen, and has a gradient")
            elif name not in self.plan.graph.unused:
                require(parameter.grad is not None, f"{name} trains, and has no gradient")
            if parameter.grad is not None:
                require(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite")
