"""The training loop: epochs of steps, evaluation, decisions between epochs, and checkpoints from which a run can be resumed."""

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import torch
from torch import Tensor

from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.files import write_atomically
from graphopt.train.checkpoint import Checkpointer
from graphopt.train.evaluation import evaluate
from graphopt.train.metrics import Meter
from graphopt.train.optimizer import named_parameters
from graphopt.train.phase import RunContext
from graphopt.train.run_log import RunLog
from graphopt.train.state import Progress, RunState, Summary
from graphopt.train.stopping import Stopped, StopSignals


class Run:
    """The training loop of one process."""

    def __init__(self, context: RunContext, state: RunState, log: RunLog, checkpointer: Checkpointer, signals: StopSignals) -> None:
        self.context, self.spec, self.strategy = context, context.spec, context.strategy
        self.state, self.log, self.checkpointer, self.signals = state, log, checkpointer, signals
        self.folder = checkpointer.folder
        self._losses: list[Tensor] = []
        self._started = time.perf_counter()
        context.features.on_progress, context.features.on_message = self._after_filling, log.screen.say

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.state.progress

    def run(self) -> Summary:
        """Trains until the last epoch; see `graphopt.train.train` for what it raises."""
        self.strategy.reset_peak_memory()
        with self.log.screen:
            while self.progress.epoch < self.spec.epochs:
                self._decide()
                self._train_epoch()
                self._close_epoch()
            self.state.phase.close()
        self.context.features.close()
        summary = Summary.of(self.state, self.strategy.describe(), str(self.folder.path))
        write_atomically(self.folder.summary, json.dumps(asdict(summary), indent=2) + "\n")
        return summary

    # -- an epoch -----------------------------------------------------------------------------------------------------------
    def _decide(self) -> None:
        """Between epochs, begins the next phase where triggers have fired."""
        state, epoch = self.state, self.progress.epoch
        if self.progress.step or not epoch:
            return
        due = self.strategy.agree(lambda: state.phase.plan.due(epoch, state.history, self.spec.epochs))
        if due:
            state.phase = state.phase.next(due, epoch)
            state.watch()
            self.log.phase(due)

    def _train_epoch(self) -> None:
        phase, progress, spec = self.state.phase, self.progress, self.spec
        if phase.begin() and self.context.features.last_decision:
            self.log.features(self.context.features.last_decision)
        phase.train_mode()
        self.log.screen.start("train", progress.epoch, phase.steps, progress.step)
        batches = self._batches()
        self.log.start_window()
        while progress.step < phase.steps:
            rate = phase.schedule.set_step(progress.total)
            loss, correct, samples = phase.step(list(islice(batches, spec.accumulate)), progress.total)
            progress.step, progress.total = progress.step + 1, progress.total + 1
            self._losses.append(loss)
            self.state.meter.add(loss, correct, samples)
            self.state.window.add(loss, correct, samples)
            self.log.screen.step(self._log_window(rate) if progress.total % spec.log_every == 0 else "")
            self._stop_if_requested()
            if spec.checkpoint_steps and progress.total % spec.checkpoint_steps == 0:
                self._save()
        self._check_losses()

    def _batches(self) -> Iterator[Batch]:
        epoch, start, mixer = self.progress.epoch, self.progress.step * self.spec.accumulate, self.context.mixer
        for number, batch in enumerate(self.state.phase.feed.batches(epoch, start), start):
            batch = self.strategy.move(batch)
            yield mixer(batch, epoch, number) if mixer is not None else batch

    def _log_window(self, rate: float) -> str:
        self._check_losses()
        return self.log.window(rate, self.spec.log_every)

    def _close_epoch(self) -> None:
        state, progress, plan = self.state, self.progress, self.state.phase.plan
        epoch = progress.epoch
        figures: dict[str, float] = {"train_loss": state.meter.loss, "train_accuracy": state.meter.accuracy}
        if (epoch + 1) % self.spec.eval_every == 0 or epoch + 1 == self.spec.epochs:
            figures |= self._evaluate()
        # Triggers get only what a resumed run measures the same: no times.
        change = state.history.close(epoch, figures, plan.scored, named_parameters(plan.module)).change
        self._update_clock()
        self.log.epoch(figures, change, progress.seconds - progress.epoch_began)
        state.meter = Meter()
        accuracy, averaged = (figures.get(name, -1.0) for name in ("accuracy", "ema_accuracy"))
        progress.epoch, progress.step, progress.epoch_began = epoch + 1, 0, progress.seconds
        progress.weights = "ema" if averaged > accuracy else "model"
        best = max(accuracy, averaged) > progress.best_accuracy
        if best:
            progress.best_accuracy, progress.best_epoch = max(accuracy, averaged), epoch
        self._save(best=best)

    def _evaluate(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        modules = {"": self.state.phase.plan.module}
        if self.state.phase.ema is not None:
            modules["ema_"] = self.state.phase.ema.module
        for prefix, module in modules.items():
            self.log.screen.start("eval", self.progress.epoch, len(self.context.evaluation))
            meter = evaluate(module, self.context.evaluation, self.strategy, self.context.classes, after_batch=self._after_evaluating)
            figures |= {f"{prefix}loss": meter.loss, f"{prefix}accuracy": meter.accuracy}
        return figures

    def _after_evaluating(self) -> None:
        self.log.screen.step()
        self._stop_if_requested()

    def _after_filling(self, done: int, rows: int) -> None:
        """Part of a feature cache is filled; a run that stops here continues with the rest when it is resumed."""
        self.log.screen.start("features", self.progress.epoch, rows, done)
        self._stop_if_requested()

    def _check_losses(self) -> None:
        """Checks that all losses since the last check are finite; they stay on the device until then, so that no step waits for its own."""
        if not self._losses:
            return
        values = torch.stack(self._losses).tolist()
        self._losses = []
        for number, value in enumerate(values, self.progress.total - len(values) + 1):
            if not math.isfinite(value):
                raise RunError(
                    f"the loss became {value} at step {number} (epoch {self.progress.epoch + 1})",
                    where=str(self.folder.path),
                    fix="Lower train.optimizer.lr, set train.clip, or use bfloat16 for float16; the last checkpoint is from before",
                )

    # -- checkpoints --------------------------------------------------------------------------------------------------------
    def _stop_if_requested(self) -> None:
        """Raises Stopped, after writing a checkpoint, if a signal has requested it."""
        if self.signals.signum is None:
            return
        self._save()
        raise Stopped(
            f"stopped at epoch {self.progress.epoch + 1}, step {self.progress.step} of {self.state.phase.steps}; a checkpoint is written",
            signum=self.signals.signum or signal.SIGINT,
            where=str(self.folder.path),
            fix="Continue with the same command and --resume",
        )

    def _save(self, *, best: bool = False) -> None:
        if not self.strategy.is_main_rank:
            return
        self._check_losses()
        self._update_clock()
        self.checkpointer.save(self.state, metrics_offset=self.log.metrics.tell(), best=best)

    def _update_clock(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._started
        self._started = now
        self.progress.peak_bytes = max(self.progress.peak_bytes, self.strategy.peak_memory())
