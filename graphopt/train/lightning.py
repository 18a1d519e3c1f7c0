"""Phases in a Lightning trainer: a callback. Importing this module needs the package `lightning`, which graphopt does not."""

from collections.abc import Mapping
from typing import Any

import lightning
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import RunSchedule
from graphopt.errors import RunError
from graphopt.train.loop import Phases, carry_over


class PhaseCallback(lightning.Callback):
    """Takes a plan from phase to phase while a Lightning trainer runs.

    Where a phase begins, the LightningModule gets the plan's new module, its `configure_optimizers` is called again, and the new optimizer
    and schedule go on with the state of the old ones, by the names of parameters.

    Attributes:
        phases: with `phases.plan`, the plan in its current phase: `callback.phases.plan.export()` gives the trained backbone.
    """

    phases: Phases

    def __init__(self, plan: Plan, attribute: str = "net", *, schedule: RunSchedule | None = None, images: Tensor | None = None) -> None:
        """`schedule`, in the place of the LightningModule's, and `images` are as in `Phases`.

        Args:
            attribute: of the LightningModule; it holds `plan.module`.
        """
        super().__init__()
        self._plan, self._attribute, self._schedule, self._images = plan, attribute, schedule, images

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks the module and the trainer; raises RunError for what cannot work."""
        if stage != "fit":
            return
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise RunError("phases need to know how long the run is", where="Trainer", fix="Give max_epochs")
        if getattr(pl_module, self._attribute, None) is not self._plan.module:
            fix = f"Set self.{self._attribute} = plan.module, or name the attribute: PhaseCallback(plan, attribute=...)"
            raise RunError(f"the LightningModule's {self._attribute!r} is not the plan's module", where="PhaseCallback", fix=fix)
        self.phases = Phases(self._plan, epochs=epochs, schedule=self._schedule, images=self._images)
        if trainer.world_size > 1 and (self._plan.moments(epochs) or self._plan.scored):
            what = "in several processes a phase cannot replace the module that Lightning has wrapped"
            raise RunError(what, where="PhaseCallback", fix="Call trainer.fit once per phase, or use `graphopt train`")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes over the learning rates, if there is a schedule. Raises RunError if the LightningModule has one, too."""
        if self._schedule is not None and trainer.lr_scheduler_configs:
            fix = "Leave the schedule out of configure_optimizers"
            raise RunError("the LightningModule has a schedule of its own", where="PhaseCallback(schedule=...)", fix=fix)
        self.phases.follow(trainer.optimizers)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins the phase of the epoch."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._begin(trainer, pl_module, 0, metrics)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins a phase that begins within the epoch."""
        step, rest = divmod(batch_idx, trainer.accumulate_grad_batches)
        if step and not rest:
            self._begin(trainer, pl_module, step, {})

    def _begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, step: int, metrics: Mapping[str, float]) -> None:
        steps = int(trainer.num_training_batches) // trainer.accumulate_grad_batches
        before: nn.Module = self.phases.module
        if not self.phases.begin(trainer.current_epoch, step, steps=steps, metrics=metrics):
            return
        after = self.phases.module
        setattr(pl_module, self._attribute, after.to(pl_module.device).train())
        optimizers, schedules = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
        trainer.strategy.setup_optimizers(trainer)
        self.phases.follow(trainer.optimizers)
        for old, new in zip(optimizers, trainer.optimizers, strict=True):
            carry_over(old, before, new, after)
        for schedule, config in zip(schedules, trainer.lr_scheduler_configs, strict=True):
            config.scheduler.load_state_dict(schedule.state_dict())
        self.phases.set_rates(trainer.current_epoch, step, steps)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints: the decisions, to know a checkpoint of another phase."""
        return {"decisions": [decision.model_dump(mode="json") for decision in self.phases.plan.decisions]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises RunError for a checkpoint of a later phase, whose module Lightning cannot make."""
        if state_dict["decisions"] != self.state_dict()["decisions"]:
            fix = "Start with the plan in that phase: plan.advance_to(decisions)"
            raise RunError("the checkpoint is of another phase of the plan", where="PhaseCallback", fix=fix)
