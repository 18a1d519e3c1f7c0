"""Training: one loop for all plans, which knows no pass by name.

Epochs of steps, evaluation, decisions between epochs, and checkpoints from which a run can be resumed. Ctrl-C and SIGTERM request a stop;
the run stops after the step, with a checkpoint.
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.data.loader import Batch, Data
from graphopt.data.randomness import reseed
from graphopt.driver import build_backbone, check_folders, compile
from graphopt.errors import RunError, listed
from graphopt.files import sealed, write_atomically
from graphopt.hashing import content_digest, hash_parts
from graphopt.spec import DataSpec, Spec, TrainSpec, dumps
from graphopt.train.checkpoint import Checkpointer
from graphopt.train.distillation import open_teacher
from graphopt.train.evaluation import Meter, evaluate, traced_output
from graphopt.train.folder import RunFolder
from graphopt.train.heap import kept_heap
from graphopt.train.ledger import LedgerFile
from graphopt.train.optimizer import named_parameters
from graphopt.train.phase import RunContext
from graphopt.train.preflight import Inputs, check_images, check_optimizer, check_outputs, check_strategy, code, settled, versions
from graphopt.train.ranks import Agreement
from graphopt.train.run_log import MetricsLog, RunLog, Screen
from graphopt.train.signals import StopSignals
from graphopt.train.state import RunState, Summary
from graphopt.train.strategies import choose


def train(
    what: Spec | Plan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    trust: bool = False,
    settings: TrainSpec | None = None,
    data: DataSpec | Data | None = None,
    tensorboard: bool = False,
    console: Console | None = None,
) -> Summary:
    """Trains a spec, or a plan compiled by hand, into the folder `out`.

    Args:
        resume: continue the run in `out` (or start it, where there is none yet). The result is bit-identical on the CPU.
        trust: let the spec run Python code that it names.
        settings, data: for a plan without a spec; otherwise they replace those of the spec.
        tensorboard: write event files under `out/tensorboard` as well.
        console: where progress is shown; None is silent.

    Raises GraphoptError if the spec, the data or the folder is wrong, the loss is not finite, the optimizer does not hold exactly the
    trainable parameters, these have no finite gradients, or frozen tensors change; Stopped on Ctrl-C or SIGTERM, after a checkpoint.
    """
    plan, spec = (None, what) if isinstance(what, Spec) else (what, what.spec)
    settings = settings or (spec.train if spec is not None else TrainSpec())
    data = data or (spec.data if spec is not None else DataSpec())
    strategy = choose(settings)
    ranks = strategy.ranks
    try:
        # Missing files are the most common mistake: the data is opened before a folder is made or anything is compiled.
        inputs = Inputs.open(settings, data, plan.sizes.full if plan is not None else spec.backbone.input, strategy)
        digest = what.digest
        known = {"the spec": digest, "its settings": settings.model_dump_json(), "the data": inputs.outline(data)}
        ranks.require_equal(known | versions("{}'s version"))
        if plan is None:
            spec = settled(spec, settings, Path(out), ranks, trust=trust)
            digest = spec.digest
        if ranks.first:
            folder = RunFolder.claim(out, digest, resume=resume or ranks.again)
        else:
            folder, console = RunFolder(Path(out)), None
        starting = Starting(spec, plan, digest, settings, data, inputs, folder, trust)
        return starting.run(console, tensorboard=tensorboard)
    except Exception as error:
        raise ranks.reported(error) from error.__cause__
    finally:
        ranks.leave()


@dataclass
class Starting:
    """What a run is made of, from its settings to the first step."""

    spec: Spec | None
    plan: Plan | None
    digest: str
    settings: TrainSpec
    data: DataSpec | Data
    inputs: Inputs
    folder: RunFolder  # claimed, on rank 0
    trust: bool

    def run(self, console: Console | None, *, tensorboard: bool) -> Summary:
        """Compiles, restores a checkpoint if there is one, and trains. A run that fails before its first step leaves nothing behind."""
        state, inputs, settings, folder = None, self.inputs, self.settings, self.folder
        strategy = inputs.strategy
        try:
            text = dumps(self.spec) if self.spec is not None else ""
            with (
                strategy.kernels(),
                kept_heap(),
                StopSignals() as signals,
                closing(inputs.feeds),
                closing(Checkpointer(folder, text, settings, self.data, strategy)) as checkpointer,
            ):
                saved, message = checkpointer.load(self.digest)
                plan = self._compiled(weights=saved is None)
                context = self._context(plan)
                state = checkpointer.restore(saved, plan, context) if saved is not None else RunState.initial(plan, context)
                context.features.check(plan)
                checkpointer.begin(self.digest)
                board = folder.path / "tensorboard" if tensorboard else None
                resumed, offset = saved is not None, saved["metrics_offset"] if saved is not None else 0
                del saved  # the run has its own copy
                path, done = folder.metrics if strategy.ranks.first else None, state.progress.total
                record = folder.ledger if settings.ledger and strategy.ranks.first else None
                with (
                    closing(MetricsLog(path, offset=offset, tensorboard=board, step=done)) as metrics,
                    closing(LedgerFile(record, len(inputs.data.train), settings.batch, done, inputs.data.train.repeats)) as ledger,
                ):
                    log = RunLog(state, metrics, Screen(console, settings.epochs), strategy)
                    log.resumed(message) if resumed else log.phase(state.phase.plan.decisions)
                    return Run(context, state, log, checkpointer, signals, ledger).run()
        except Exception:
            if state is not None and not state.progress.total:
                folder.abandon()
            raise
        finally:
            folder.release()

    def _compiled(self, *, weights: bool) -> Plan:
        """The plan, checked against the data and the settings; with `weights`, the spec's own are loaded into the backbone."""
        plan, spec, settings = self.plan, self.spec, self.settings
        if plan is None:
            assert spec is not None
            reseed(settings.seed)  # Python's and NumPy's generators
            torch.manual_seed(settings.seed)
            model = build_backbone(spec.backbone, trust=self.trust, weights=weights)
            plan = compile(model, spec, verify=spec.verify or "fast", costs=False, trust=self.trust)
            check_folders(plan, trust=self.trust)
        plan.check_phases(settings.epochs)
        check_outputs(plan, self.inputs.data.classes)
        check_optimizer(plan, settings, len(self.inputs.feeds.images) // settings.accumulate)
        check_images(plan, settings, self.inputs)
        check_strategy(plan, settings, self.inputs.strategy.ranks.count)
        self.inputs.strategy.check(plan)
        if self.inputs.strategy.ranks.count > 1:  # else there is nothing to compare it with
            known = code(plan.backbone) | {"the initial weights": content_digest(plan.module.state_dict())}
            self.inputs.strategy.ranks.require_equal(known)
        return plan

    def _context(self, plan: Plan) -> RunContext:
        identity = dict[str, Any](data={}, seed=self.settings.seed)  # everything that determines the inputs of training
        if isinstance(self.data, DataSpec):
            identity["data"] = self.data.model_dump(mode="json", exclude={"workers", "cache"})
        inputs = self.inputs
        features = inputs.features(self.folder.features, plan.digest, identity)
        if inputs.mixer is not None:
            inputs.mixer.score(traced_output(plan).shape[1])
        teacher = open_teacher(self.settings, plan, inputs.data, trust=self.trust)
        if teacher is not None:
            inputs.strategy.to_device(teacher)
        return RunContext(self.settings, inputs.strategy, inputs.feeds, inputs.data.classes, inputs.mixer, features, teacher)


class Stopped(RunError):
    """A run that stopped on request and can be resumed. Its exit code is 128 + the signal's number, as in shells."""

    def __init__(self, what: str, *, signum: int = signal.SIGINT, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signum


class Run:
    """The training loop of one process."""

    def __init__(
        self, context: RunContext, state: RunState, log: RunLog, checkpointer: Checkpointer, signals: StopSignals, ledger: LedgerFile
    ) -> None:
        self.context, self.spec, self.strategy = context, context.spec, context.strategy
        self.state, self.progress, self.log, self.checkpointer, self.signals = state, state.progress, log, checkpointer, signals
        self.folder = checkpointer.folder
        self._losses: list[Tensor] = []
        self._started = time.perf_counter()
        context.features.on_progress, context.features.on_message = self._after_filling, log.screen.say
        self.ledger = ledger
        self._taken: list[int] = []  # samples of the step, on this rank; collected only for the ledger
        self._agreed = Agreement(self.strategy.peers, self._record if self.spec.ledger else None)
        self.strategy.signal = lambda: self.signals.signum or 0

    def run(self) -> Summary:
        self.strategy.begin_memory(self.state.phase.plan.module)
        with self.log.screen.progress:
            while self.progress.epoch < self.spec.epochs:
                self._decide()
                if self._train_on():
                    self._close_epoch()
            self.state.phase.close()
        self.checkpointer.finish()
        self.context.features.close()
        summary = Summary.of(self.state, self.strategy.describe(), str(self.folder.path), self._data_digest(), versions())
        if self.strategy.ranks.first:
            write_atomically(self.folder.summary, sealed(asdict(summary), indent=2) + "\n")
        return summary

    def _data_digest(self) -> str:
        feeds = (self.context.feeds.images, self.context.feeds.evaluation) if self.strategy.ranks.first else ()
        return hash_parts(*(feed.samples.fingerprint().encode() for feed in feeds))

    def _decide(self) -> None:
        """Begins the next phase where triggers have fired: between epochs, and at moments within one that were known before."""
        state, progress, epochs = self.state, self.progress, self.spec.epochs
        if not progress.total or progress.step == state.phase.steps:  # the end of the epoch comes before what follows it
            return
        due, reached = tuple[Decision, ...](), {moment for moment, step in state.phase.moments() if step == progress.total}
        for moment in sorted(reached | ({progress.epoch} if not progress.step else set())):
            due += state.phase.plan.due(moment, state.history, epochs, due)
        if due:
            size, state.phase = state.phase.plan.base.input, state.phase.next(due, due[-1].epoch)
            if state.phase.plan.base.input != size:
                progress.best_accuracy = -1.0  # accuracies at two sizes are not compared
            self.strategy.reset_peak_memory()
            state.watch()
            self.log.phase(due)

    def _train_on(self) -> bool:
        """Trains up to the next moment at which a trigger may fire. True if that is the end of the epoch."""
        phase, progress, spec = self.state.phase, self.progress, self.spec
        end = phase.end(progress.epoch, progress.total)
        if phase.begin(progress.epoch) and self.context.features.last_decision:
            self.log.write("features", **self.context.features.last_decision)
        phase.train_mode()
        self.log.screen.start("train", progress.epoch, phase.steps, progress.step)
        batches = self._batches(end)
        self.log.start_window()
        while progress.step < end:
            rate = phase.schedule.set_step(progress.total)
            step = phase.step(batches, progress.total)
            progress.step, progress.total = progress.step + 1, progress.total + 1
            self._losses.append(step.total)
            step.add_to(self.state.meter, self.state.window)
            if logged := progress.total % spec.log_every == 0:
                self._check_losses()
            self.log.screen.step(self.log.window(rate, spec.log_every) if logged else "")
            asked = self.strategy.requested(self.signals.signum or 0)
            agreed = self._agreed(asked, progress.total, progress.epoch, *self._taken)
            self._stop_if_requested(agreed if self.strategy.peers == self.strategy.ranks else asked)  # a chain has agreed before
            self._taken.clear()
            self.checkpointer.raise_failure()
            if spec.checkpoint_steps and progress.total % spec.checkpoint_steps == 0:
                self._save()
        self._check_losses()
        return progress.step == phase.steps

    def _batches(self, end: int) -> Iterator[Batch]:
        """Those of the epoch's steps until `end`."""
        count = (end - self.progress.step) * self.spec.accumulate
        for batch in self.strategy.batches(self._prepared(), count, training=True):
            if self.spec.ledger:
                self._taken += batch.sample.tolist()
            yield batch

    def _prepared(self) -> Iterator[Batch]:
        epoch, start, mixer = self.progress.epoch, self.progress.step * self.spec.accumulate, self.context.mixer
        for number, batch in enumerate(self.state.phase.feed.batches(epoch, start), start):
            batch = self.strategy.move(batch)
            yield mixer(batch, epoch, number) if mixer is not None else batch

    def _record(self, taken: Tensor) -> None:
        """Enters a step in the ledger: per rank, its number, its epoch and the samples."""
        step, epoch = taken[0, :2].tolist()
        self.ledger.add(step, epoch, taken[:, 2:])

    def _close_epoch(self) -> None:
        state, progress, plan = self.state, self.progress, self.state.phase.plan
        epoch, chain = progress.epoch, self.strategy.times()
        state.phase.check_ranks(f"the weights after epoch {epoch}")
        state.phase.average_buffers()
        meter = state.meter.over(self.strategy.ranks)
        figures: dict[str, float] = {"train_loss": meter.loss, "train_accuracy": meter.accuracy}
        if plan.needs.targets:
            figures["train_local_loss"] = meter.local_loss
        figures |= self._evaluate() if (epoch + 1) % self.spec.eval_every == 0 or epoch + 1 == self.spec.epochs else {}
        # Triggers get only what a resumed run measures the same: no times.
        state.phase.share_scored()
        measured = (plan.scored, named_parameters(plan.module), str(plan.base.input), state.phase.similarities())
        change = state.history.close(epoch, figures, *measured).change
        self._update_clock()
        peak = self.log.epoch(figures, change, meter.samples, progress.seconds - progress.epoch_began, chain)
        progress.peak_bytes = max(progress.peak_bytes, peak)
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
        agreed = Agreement(self.strategy.peers)  # on a stop, batch by batch

        def after_batch(*_: Tensor) -> None:
            self.log.screen.step()
            self._stop_if_requested(agreed(self.strategy.requested(self.signals.signum or 0)))

        for prefix, module in self.state.phase.evaluated().items():
            self.log.screen.start("eval", self.progress.epoch, len(self.context.feeds.evaluation))
            meter = evaluate(module, self.context.feeds.evaluation, self.strategy, self.context.classes, after_batch=after_batch)
            agreed.finish()
            means = {"loss": meter.loss, "accuracy": meter.accuracy, "top5_accuracy": meter.top5_accuracy}
            figures |= {f"{prefix}{name}": value for name, value in means.items()}
            if not math.isfinite(meter.loss):
                self._check_finite()  # the usual cause
                what = f"the evaluation's loss became {meter.loss} after step {self.progress.total} (epoch {self.progress.epoch})"
                raise RunError(what, where=str(self.folder.path), fix=self._lower())
        return figures

    def _lower(self) -> str:
        advice = "Lower train.optimizer.lr, set train.clip, or use bfloat16 for float16"
        return f"{advice}; the last checkpoint is from before" if self.folder.last.exists() else advice

    def _after_filling(self, done: int, rows: int, signum: int) -> None:
        """Part of a feature cache is filled; a run that stops here continues with the rest when it is resumed."""
        self.log.screen.start("features", self.progress.epoch, rows, done)
        self._stop_if_requested(signum)

    def _check_losses(self) -> None:
        """Checks that all losses since the last check are finite; they stay on the device until then, so that no step waits for its own."""
        values = torch.stack(self._losses).tolist() if self._losses else []
        self._losses = []
        for number, value in enumerate(values, self.progress.total - len(values) + 1):
            if not math.isfinite(value):
                what = f"the loss became {value} at step {number} (epoch {self.progress.epoch})"
                raise RunError(what, where=str(self.folder.path), fix=self._lower())

    def _check_finite(self) -> None:
        """Checks that everything that a checkpoint would restore is finite: the loss shows an update that is not only in the next step."""
        names = self.state.phase.not_finite()
        if names:
            what = f"not finite after step {self.progress.total} (epoch {self.progress.epoch}): {listed(names)}"
            raise RunError(what, where=str(self.folder.path), fix=self._lower())

    def _stop_if_requested(self, signum: int) -> None:
        """Raises Stopped, after writing a checkpoint, if a signal (0 is none) has requested it."""
        if signum:
            self._save()
            self.checkpointer.finish()
            done = f"epoch {self.progress.epoch}, step {self.progress.step} of {self.state.phase.steps}"
            fix = "Continue with the same command and --resume"
            raise Stopped(f"stopped at {done}; a checkpoint is written", signum=signum, where=str(self.folder.path), fix=fix)

    def _save(self, *, best: bool = False) -> None:
        self._check_losses()
        self._check_finite()
        self._update_clock()
        self._agreed.finish()
        self.ledger.sync()
        self.checkpointer.save(self.state, metrics_offset=self.log.metrics.tell(), best=best)

    def _update_clock(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._started
        self._started = now
        self.progress.peak_bytes = max(self.progress.peak_bytes, self.strategy.peak_memory())
