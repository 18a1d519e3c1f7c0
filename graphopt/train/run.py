"""A run in progress: epochs of steps, evaluation, decisions between epochs, and checkpoints from which all of it goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Batch, ImageFeed, Mixer, mixed_seed, preserved, reseed
from graphopt.errors import RunError
from graphopt.files import write_atomically
from graphopt.train.checkpoint import FORMAT, RunFolder, random_states, restore_random_states
from graphopt.train.evaluation import evaluate
from graphopt.train.history import History
from graphopt.train.metrics import Meter, MetricsLog
from graphopt.train.optimizer import named_parameters
from graphopt.train.phase import Phase, Setting
from graphopt.train.screen import Screen
from graphopt.train.settings import check_same_settings
from graphopt.train.stopping import Stopped, StopSignals


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; also `summary.json`.

    Attributes:
        accuracy, loss: of the full network on the evaluation split after the last epoch; `ema_accuracy` of the averaged weights.
        best_accuracy, best_epoch: of the checkpoint in best.pt, by the better of its two sets of weights; epochs from 0.
        seconds: training and evaluation, interruptions left out.
        peak_bytes: allocated on the GPU at most, or resident in the process at most.
        phases: per phase, its first epoch and the decisions that began it.
    """

    name: str
    digest: str
    epochs: int
    steps: int
    accuracy: float
    loss: float
    ema_accuracy: float | None
    best_accuracy: float
    best_epoch: int
    seconds: float
    peak_bytes: int
    device: str
    parameters: int
    trainable_parameters: int
    phases: tuple[dict[str, Any], ...]
    folder: str


@dataclass
class Progress:
    """Where a run is; all of it in every checkpoint.

    Attributes:
        epoch, step: the epoch that runs (from 0), and its optimizer steps done.
        total: optimizer steps done in the run.
        seconds: spent so far; `epoch_began`, when the epoch that runs began. peak_bytes: the highest peak so far.
        best_accuracy, best_epoch: the highest so far, and when; -1 before the first evaluation.
        weights: which were better at the last evaluation, "model" or "ema" (the averaged ones).
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    epoch_began: float = 0.0
    peak_bytes: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    weights: str = "model"


class Run:
    """One process's part in a run."""

    def __init__(
        self,
        plan: Plan,
        setting: Setting,
        evaluation: ImageFeed,
        mixer: Mixer | None,
        folder: RunFolder,
        *,
        spec: str,
        settings: Mapping[str, Any],
        screen: Screen,
        signals: StopSignals,
        tensorboard: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.setting, self.spec, self.strategy = setting, setting.spec, setting.strategy
        self.evaluation, self.mixer, self.folder = evaluation, mixer, folder
        self.screen, self.signals = screen, signals
        self._spec_text, self._settings = spec, settings
        self.history, self.at = History(), Progress()
        self.phases: list[dict[str, Any]] = []
        self.meter, self.window = Meter(), Meter()
        self.losses: list[Tensor] = []
        offset = 0
        if state is None:
            self.phase = self._first_phase(plan)
        else:
            check_same_settings(state["settings"], settings, str(folder.path))
            decisions = [Decision(**{**d, "regions": _tuple(d["regions"])}) for d in state["decisions"]]
            self.phase = Phase(plan.advance_to(decisions) if decisions else plan, setting)
            self._load(state)
            offset = state["metrics_offset"]
        board = folder.path / "tensorboard" if tensorboard else None
        self.log = MetricsLog(folder.metrics, offset=offset, tensorboard=board, step=self.at.total)
        if state is None:
            self._log_phase(self.phase.plan.decisions)
        else:
            self.log.write({"kind": "resume", "step": self.at.total, "epoch": self.at.epoch})
            screen.say(f"goes on at epoch {self.at.epoch + 1}, step {self.at.step}")
        if setting.features is not None:
            setting.features.check(plan)
            setting.features.progress, setting.features.say = self._filled, screen.say
        self._started = time.perf_counter()

    def _filled(self, done: int, rows: int) -> None:
        """A part of a feature cache is there; a stop asked for meanwhile comes now, and the fill goes on from here when resumed."""
        self.screen.start("features", self.at.epoch, rows, done)
        if self.signals.signum is not None:
            raise _StopAsked

    def _first_phase(self, plan: Plan) -> Phase:
        due = self.strategy.agree(lambda: plan.due(0, self.history, self.spec.epochs))
        if due:
            with preserved():
                reseed(self.spec.seed, 0, 2)
                plan = plan.advance_to((*plan.decisions, *due))
        phase = Phase(plan, self.setting)
        # From here on the model draws from a stream that compiling and verifying have not touched.
        torch.manual_seed(mixed_seed(self.spec.seed, 3))
        self.history.watch(phase.scored(), named_parameters(phase.plan.module))
        return phase

    # -- the loop -----------------------------------------------------------------------------------------------------------
    def run(self) -> Summary:
        """Train until the last epoch; see `graphopt.train.train` for what it raises."""
        self.strategy.reset_peak_memory()
        try:
            with self.screen:
                while self.at.epoch < self.spec.epochs:
                    self._decide()
                    self._train_epoch()
                    self._close_epoch()
                self.phase.close()
            if self.setting.features is not None:
                self.setting.features.close()
            return self._summarise()
        except _StopAsked:
            self._stop()
            raise AssertionError("unreachable") from None
        finally:
            self.log.close()

    def _decide(self) -> None:
        """R3: between epochs, what the triggers decide becomes the next phase."""
        if self.at.step or not self.at.epoch:
            return
        plan = self.phase.plan
        due = self.strategy.agree(lambda: plan.due(self.at.epoch, self.history, self.spec.epochs))
        if not due:
            return
        self.phase = self.phase.next(due, self.at.epoch)
        self.history.watch(self.phase.scored(), named_parameters(self.phase.plan.module))
        self._log_phase(due)

    def _train_epoch(self) -> None:
        phase, at, every = self.phase, self.at, self.spec.log_every
        if phase.begin() and self.setting.features is not None and self.setting.features.told:
            self.log.write({"kind": "features", "step": at.total, "epoch": at.epoch, **self.setting.features.told})
        phase.train_mode()
        self.screen.start("train", at.epoch, phase.steps, at.step)
        batches = self._batches()
        self._lap = time.perf_counter(), at.total
        while at.step < phase.steps:
            rate = phase.schedule.set_step(at.total)
            loss, correct, samples = phase.step(list(islice(batches, self.spec.accumulate)), at.total)
            at.step, at.total = at.step + 1, at.total + 1
            self.losses.append(loss)
            self.meter.add(loss, correct, samples)
            self.window.add(loss, correct, samples)
            self.screen.step(self._log_window(rate) if at.total % every == 0 else "")
            if self.signals.signum is not None:
                raise _StopAsked
            if self.spec.checkpoint_steps and at.total % self.spec.checkpoint_steps == 0:
                self._save()
        self._check_losses()

    def _batches(self) -> Iterator[Batch]:
        epoch, start = self.at.epoch, self.at.step * self.spec.accumulate
        for number, batch in enumerate(self.phase.feed.batches(epoch, start), start):
            batch = self.strategy.move(batch)
            yield self.mixer(batch, epoch, number) if self.mixer is not None else batch

    def _close_epoch(self) -> None:
        at, phase = self.at, self.phase
        epoch = at.epoch
        figures: dict[str, float] = {"train_loss": self.meter.loss, "train_accuracy": self.meter.accuracy}
        if (epoch + 1) % self.spec.eval_every == 0 or epoch + 1 == self.spec.epochs:
            figures |= self._evaluate()
        # Triggers see only what a resumed run measures the same; how long it took is for people.
        entry = self.history.close(epoch, figures, phase.scored(), named_parameters(phase.plan.module))
        self._clock()
        seconds, at.epoch_began = at.seconds - at.epoch_began, at.seconds
        record = {
            "kind": "epoch",
            "epoch": epoch,
            "step": at.total,
            "phase": len(self.phases) - 1,
            **figures,
            "seconds": seconds,
            "samples_per_second": self.meter.samples / max(seconds, 1e-9),
            "peak_bytes": at.peak_bytes,
            **({"change": entry.change} if entry.change else {}),
        }
        self.log.write(record)
        self.screen.epoch(record)
        self.meter = Meter()
        at.epoch, at.step = epoch + 1, 0
        at.weights = "ema" if figures.get("ema_accuracy", -1.0) > figures.get("accuracy", -1.0) else "model"
        score = max(figures.get("accuracy", -1.0), figures.get("ema_accuracy", -1.0))
        better = score > at.best_accuracy
        if better:
            at.best_accuracy, at.best_epoch = score, epoch
        self._save(best=better)

    def _evaluate(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        modules = {"": self.phase.plan.module}
        if self.phase.ema is not None:
            modules["ema_"] = self.phase.ema.module
        for prefix, module in modules.items():
            self.screen.start("eval", self.at.epoch, len(self.evaluation))
            meter = evaluate(module, self.evaluation, self.strategy, self.setting.classes, each=self._each_evaluated)
            figures |= {f"{prefix}loss": meter.loss, f"{prefix}accuracy": meter.accuracy}
        return figures

    def _each_evaluated(self) -> None:
        self.screen.step()
        if self.signals.signum is not None:
            raise _StopAsked

    # -- what is told -------------------------------------------------------------------------------------------------------
    def _log_window(self, rate: float) -> str:
        self._check_losses()
        self.strategy.synchronize()
        (start, first), now = self._lap, time.perf_counter()
        step_seconds = (now - start) / max(1, self.at.total - first)
        per_step = self.window.samples / self.spec.log_every
        self.log.write(
            {
                "kind": "step",
                "step": self.at.total,
                "epoch": self.at.epoch,
                "phase": len(self.phases) - 1,
                "loss": self.window.loss,
                "accuracy": self.window.accuracy,
                "lr": rate,
                "step_seconds": step_seconds,
                "samples_per_second": per_step / step_seconds if step_seconds else 0.0,
                "peak_bytes": self.strategy.peak_memory(),
            }
        )
        note = f"loss {self.window.loss:.4f}"
        self.window = Meter()
        self._lap = time.perf_counter(), self.at.total
        return note

    def _log_phase(self, decisions: tuple[Decision, ...]) -> None:
        plan = self.phase.plan
        parameters = named_parameters(plan.module).values()
        record = {
            "kind": "phase",
            "step": self.at.total,
            "epoch": self.at.epoch,
            "phase": len(self.phases),
            "decisions": [{**d.model_dump(mode="json"), "pass": plan.passes[d.index].name} for d in decisions],
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }
        self.phases.append({key: record[key] for key in ("phase", "epoch", "step", "decisions")})
        self.log.write(record)
        self.screen.phase(record)

    def _check_losses(self) -> None:
        """Losses since the last look; kept on the device until now, so that no step waits for its own."""
        if not self.losses:
            return
        values = torch.stack(self.losses).tolist()
        first = self.at.total - len(values)
        self.losses = []
        for number, value in enumerate(values, first + 1):
            if not math.isfinite(value):
                raise RunError(
                    f"the loss became {value} at step {number} (epoch {self.at.epoch + 1})",
                    where=str(self.folder.path),
                    fix="Lower train.optimizer.lr, set train.clip, or use bfloat16 for float16; the last checkpoint is from before.",
                )

    def _clock(self) -> None:
        now = time.perf_counter()
        self.at.seconds += now - self._started
        self._started = now
        self.at.peak_bytes = max(self.at.peak_bytes, self.strategy.peak_memory())

    def _summarise(self) -> Summary:
        plan, last = self.phase.plan, self.history.records[-1].metrics
        parameters = named_parameters(plan.module).values()
        summary = Summary(
            name=plan.name,
            digest=plan.digest,
            epochs=self.at.epoch,
            steps=self.at.total,
            accuracy=last["accuracy"],
            loss=last["loss"],
            ema_accuracy=last.get("ema_accuracy"),
            best_accuracy=self.at.best_accuracy,
            best_epoch=self.at.best_epoch,
            seconds=self.at.seconds,
            peak_bytes=self.at.peak_bytes,
            device=self.strategy.describe(),
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            phases=tuple(self.phases),
            folder=str(self.folder.path),
        )
        text = json.dumps(asdict(summary), indent=2) + "\n"
        write_atomically(self.folder.summary, text.encode())
        return summary

    # -- checkpoints --------------------------------------------------------------------------------------------------------
    def _stop(self) -> None:
        self._save()
        signum = self.signals.signum or 2
        raise Stopped(
            f"stopped at epoch {self.at.epoch + 1}, step {self.at.step} of {self.phase.steps}; a checkpoint is written",
            signum=signum,
            where=str(self.folder.path),
            fix="Go on with the same command and --resume.",
        )

    def _save(self, *, best: bool = False) -> None:
        if not self.strategy.first:
            return
        self._check_losses()
        self._clock()
        plan = self.phase.plan
        self.folder.save(
            {
                "graphopt": FORMAT,
                "spec": self._spec_text,
                "digest": plan.digest,
                "decisions": [decision.model_dump(mode="json") for decision in plan.decisions],
                "settings": dict(self._settings),
                "phase": self.phase.state_dict(),
                "progress": asdict(self.at),
                "steps_per_epoch": self.phase.steps,
                "phases": self.phases,
                "history": self.history.state_dict(),
                "meter": self.meter.state_dict(),
                "window": self.window.state_dict(),
                "random": random_states(),
                "metrics_offset": self.log.tell(),
            },
            best=best,
            keep=self.spec.keep,
            epoch=self.at.epoch if not self.at.step else None,
        )

    def _load(self, state: Mapping[str, Any]) -> None:
        self.phase.load_state_dict(state["phase"])
        self.at = Progress(**state["progress"])
        if self.at.step and state["steps_per_epoch"] != self.phase.steps:
            raise RunError(
                f"an epoch had {state['steps_per_epoch']} steps and has {self.phase.steps} now, with {self.at.step} of them done",
                where=str(self.folder.path),
                fix="The data has changed; bring back what was there, or start a new run.",
            )
        self.phases = list(state["phases"])
        self.history = History.from_state_dict(state["history"])
        device = self.strategy.device
        self.meter, self.window = (Meter.from_state_dict(state[name], device) for name in ("meter", "window"))
        restore_random_states(state["random"])


class _StopAsked(Exception):
    """Inside the loop: a signal has asked for a stop."""


def _tuple(value: Any) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)
