"""The phases of a plan in a training loop that is not the built-in one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.compiler.pipeline import Verify
from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision, RunSchedule, step_at
from graphopt.errors import RunError
from graphopt.plan_file import load_strictly
from graphopt.train.checks import check_frozen, fingerprints
from graphopt.train.optimizer import load_optimizer_state, named_parameters, optimizer_state
from graphopt.train.phase import advance
from graphopt.train.region_rates import RegionRates
from graphopt.train.similarity import similarities
from graphopt.train.state import History


class Phases:
    """Takes a plan from phase to phase in a training loop of your own.

        phases = graphopt.Phases(plan, lambda module: torch.optim.SGD(module.parameters(), lr=0.1), epochs=10)
        for epoch in range(10):
            phases.begin(epoch)
            for x, target in batches:
                loss = criterion(phases.module(x), target)
                ...
        backbone = phases.plan.export()

    Attributes:
        plan: in its current phase, with the weights as they are. optimizer: of its module; None where no function makes one.
        epochs: length of the run, which some triggers go by. schedule: of the learning rate, where `begin` sets it.
    """

    def __init__(
        self,
        plan: Plan,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        *,
        epochs: int,
        seed: int = 0,
        verify: Verify = "fast",
        schedule: RunSchedule | None = None,
        sets_rates: bool = False,
        images: Tensor | None = None,
    ) -> None:
        """Begins with the plan as it is.

        Args:
            make_optimizer: called with the module of each phase.
            epochs: length of the run. seed: of what passes initialise in later phases.
            verify: how much is checked when a later phase is compiled, as in `graphopt.compile`.
            schedule: the run's learning rate after a share of the run (0 to 1), as a factor of what the optimizer was made with. `begin`
                then sets the rates of all groups before every step, those that passes set for their regions, too.
            sets_rates: the loop itself sets the learning rates that passes ask for (`plan.learning_rates`).
            images: a batch on which the outputs of regions are compared from epoch to epoch, for triggers that decide by them.

        Raises:
            RunError: a pass sets learning rates, and neither `schedule`, which they are relative to, nor `sets_rates` is given; or a
                trigger compares outputs, and there are no `images`.
        """
        if plan.compared and images is None:
            what = f"a trigger compares the outputs of {plan.compared[0]} from epoch to epoch"
            raise RunError(what, where="Phases", fix="Give images=..., a batch of the evaluation data")
        if plan.learning_rates.regions and schedule is None and not sets_rates:
            what = f"a pass sets the learning rate of {plan.learning_rates.regions[0].name}, relative to the run's own schedule"
            raise RunError(what, where="Phases", fix="Give schedule=..., a function of the share of the run that is over")
        self.plan, self.epochs, self.schedule = plan, epochs, schedule
        self._make, self._seed, self._verify, self._images = make_optimizer, seed, verify, images
        self.optimizer: torch.optim.Optimizer | None = None
        self._rates: list[RegionRates] = []
        if make_optimizer is not None:
            self.optimizer = make_optimizer(plan.module)
            self.follow([self.optimizer])
        self._history, self._frozen = History(), fingerprints(plan.module)
        self._within = schedule is not None or any(moment != int(moment) for moment in plan.moments(epochs))

    @property
    def module(self) -> nn.Module:
        """What trains in the current phase."""
        return self.plan.module

    def follow(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Lets `begin` set the rates of these optimizers of `module`, if there is a schedule; their groups are divided by region."""
        if self.schedule is not None:
            self._rates = [RegionRates(each, self.module, self.plan.learning_rates, self.schedule) for each in optimizers]

    def set_rates(self, epoch: int, step: int, steps: int) -> None:
        """Sets the learning rates of the step that comes next, if there is a schedule. `begin` does it."""
        for rates in self._rates:
            rates.set((epoch * steps + step) / (self.epochs * steps))

    def begin(
        self,
        epoch: int,
        step: int = 0,
        *,
        steps: int | None = None,
        metrics: Mapping[str, float] | None = None,
        decisions: Sequence[Decision] = (),
    ) -> bool:
        """Begins the phase that `epoch` (from 0) trains in, before its first step; True where it is a new one.

        Then `plan`, `module` and `optimizer` are others: weights are carried over by name, and so are the optimizer's state and the
        settings of its groups. What holds on to the earlier ones (a schedule, DDP) has to be made again.

        Args:
            step: steps of the epoch that are done; where phases begin within epochs, or with a schedule, call it before every step.
            steps: those that an epoch has.
            metrics: figures of the epoch before, for triggers that read them.
            decisions: what you decide yourself, next to the triggers.

        Raises:
            RunError: frozen tensors have changed; or `steps` was not given, but a phase begins within an epoch or there is a schedule.
        """
        if self._within and steps is None:
            fix = "Call begin(epoch, step, steps=len(batches)) before every step"
            what = "the learning rate follows a schedule" if self.schedule is not None else "a phase of this plan begins within an epoch"
            raise RunError(what, where=f"epoch {epoch}", fix=fix)
        if not step:
            self._end_epoch(epoch - 1, metrics or {})
        due = tuple(decisions)
        for moment in self._reached(epoch, step, steps):
            due += self.plan.due(moment, self._history, self.epochs, due)
        if due:
            check_frozen(self.module, self._frozen)
            self._take(advance(self.plan, due, self._seed, due[-1].epoch, verify=self._verify))
        if steps is not None:
            self.set_rates(epoch, step, steps)
        return bool(due)

    def _reached(self, epoch: int, step: int, steps: int | None) -> Iterable[float]:
        moments = {float(epoch)} if not step else set()
        if steps is not None:
            moments |= {m for m in self.plan.moments(self.epochs) if step_at(m, steps) == epoch * steps + step}
        return sorted(moments)

    def _end_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Measures what triggers by score read, once for each epoch that has ended."""
        parameters, scored = named_parameters(self.module), self.plan.scored
        if epoch >= 0 and (not self._history.records or self._history.records[-1].epoch < epoch):
            similar = similarities(self.plan, self._images) if self._images is not None and self.plan.compared else None
            self._history.close(epoch, metrics, scored, parameters, str(self.plan.base.input), similar)
        self._history.watch(scored, parameters)

    def _take(self, plan: Plan) -> None:
        earlier, self.plan = self.plan, plan
        if self._make is not None and self.optimizer is not None:
            old, self.optimizer = self.optimizer, self._make(plan.module)
            self.follow([self.optimizer])
            carry_over(old, earlier.module, self.optimizer, plan.module)
        self._frozen = fingerprints(plan.module)
        self._history.watch(plan.scored, named_parameters(plan.module))

    def state_dict(self) -> dict[str, Any]:
        """What a loop goes on from: decisions, weights, the optimizer's state by name, and what triggers have measured."""
        optimizer = None if self.optimizer is None else optimizer_state(self.optimizer, self.module)
        decisions = [decision.model_dump(mode="json") for decision in self.plan.decisions]
        return {"decisions": decisions, "module": self.module.state_dict(), "optimizer": optimizer, "history": self._history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, also from another phase. Raises RunError if the weights are not those of this plan."""
        decisions = tuple(Decision.model_validate(decision) for decision in state["decisions"])
        if decisions != self.plan.decisions:
            self._take(self.plan.advance_to(decisions, verify="off"))
        load_strictly(self.module, state["module"])
        if self.optimizer is not None and state["optimizer"] is not None:
            load_optimizer_state(self.optimizer, self.module, state["optimizer"])
        self._frozen, self._history = fingerprints(self.module), History.from_state_dict(state["history"])


def carry_over(old: torch.optim.Optimizer, before: nn.Module, new: torch.optim.Optimizer, after: nn.Module) -> None:
    """Gives an optimizer the state of another by the names of parameters, and the settings of groups where there are as many of them."""
    load_optimizer_state(new, after, optimizer_state(old, before), named_parameters(before))
