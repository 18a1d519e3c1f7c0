"""The records of a run: metrics.jsonl, TensorBoard and the console. Nothing else in the runner prints."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graphopt.compiler.triggers import Decision
from graphopt.cost.figures import FIGURES
from graphopt.errors import CostError, RunError
from graphopt.files import reason, sealed
from graphopt.train.evaluation import Meter
from graphopt.train.optimizer import parameter_counts
from graphopt.train.ranks import Ranks
from graphopt.train.state import RunState
from graphopt.train.strategy import Strategy
from graphopt.units import show_size


class MetricsLog:
    """metrics.jsonl, truncated to `offset` (so that steps trained twice are logged once), and on request the same in TensorBoard.

    Without a path (on ranks other than 0) it writes nothing.
    """

    def __init__(self, path: Path | None, *, offset: int = 0, tensorboard: Path | None = None, step: int = 0) -> None:
        self._path, self._board = path, None
        if path is None:
            return
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
            # A file that is shorter than it was may end in half a record.
            whole = self._file.read(offset).rfind(b"\n") + 1
            self._file.truncate(whole)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise RunError(f"cannot be written: {reason(error)}", where=str(path)) from error
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RunError("TensorBoard is not installed", fix="Run `pip install tensorboard`") from error
            self._board = SummaryWriter(str(tensorboard), purge_step=step or None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; numbers of an epoch or a step also go to TensorBoard under its `kind`."""
        if self._path is None:
            return
        try:
            self._file.write(sealed(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            fix = "Make room, then continue with --resume"
            raise RunError(f"could not be written: {reason(error)}", where=str(self._path), fix=fix) from error
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                    self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def tell(self) -> int:
        """Bytes written so far, all of them on disk."""
        if self._path is None:
            return 0
        with suppress(OSError):  # a checkpoint must not fail because of its log
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._path is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Screen:
    """A progress bar over the epoch and a line per epoch; silent without a console. Shown while `progress` is open."""

    def __init__(self, console: Console | None, epochs: int) -> None:
        self._console, self.epochs = console, epochs
        note, what = TextColumn("{task.fields[note]}"), TextColumn("{task.description}")
        self.progress = Progress(
            *(what, BarColumn(bar_width=None), MofNCompleteColumn(), note, TimeRemainingColumn()),
            console=console or Console(quiet=True),
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self.progress.add_task("", total=None, note="", visible=False)
        #: steps that the bar does not show yet, and when it will
        self._untold, self._next = 0, 0.0

    def at(self, epoch: int) -> str:
        """Epochs are counted as in a spec, from 0: the last of four is `epoch 3/3`."""
        return f"epoch {epoch}/{self.epochs - 1}"

    def say(self, text: str) -> None:
        if self._console is not None:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, what: str, epoch: int, total: int, done: int = 0) -> None:
        description, self._untold = f"{self.at(epoch)} {what}", 0
        self.progress.reset(self._task, total=total, completed=done, description=description, note="", visible=True)

    def step(self, note: str = "") -> None:
        """One step more; the bar is drawn ten times a second, and is told no oftener."""
        self._untold += 1
        if note or time.monotonic() >= self._next:
            fields: dict[str, Any] = {"note": note} if note else {}
            self.progress.update(self._task, advance=self._untold, **fields)
            self._untold, self._next = 0, time.monotonic() + 0.1


class RunLog:
    """Writes the records of a run."""

    def __init__(self, state: RunState, metrics: MetricsLog, screen: Screen, strategy: Strategy) -> None:
        self.state, self.metrics, self.screen, self._strategy = state, metrics, screen, strategy
        self._lap = time.perf_counter(), 0

    def write(self, kind: str, **figures: Any) -> dict[str, Any]:
        """Writes one record, and returns it."""
        progress = self.state.progress
        record = {"kind": kind, "step": progress.total, "epoch": progress.epoch, **figures}
        self.metrics.write(record)
        return record

    def resumed(self, message: str | None) -> None:
        """A run that continues; `message` says why not from its last checkpoint."""
        progress = self.state.progress
        self.write("resume", **({"message": message} if message else {}))
        if message:
            self.screen.say(message)
        self.screen.say(f"resumes at epoch {progress.epoch}, step {progress.step}")

    def phase(self, decisions: tuple[Decision, ...]) -> None:
        plan, phases = self.state.phase.plan, self.state.phases
        made = [{**d.model_dump(mode="json"), "pass": plan.passes[d.index].name} for d in decisions]
        record = self.write("phase", phase=len(phases), decisions=made, **parameter_counts(plan.module), forecast=self._forecast())
        phases.append({key: record[key] for key in ("phase", "epoch", "step", "decisions", "forecast")})
        why = [f"{d['action']} {d['pass']}" + (f" ({', '.join(d['regions'])})" if d["regions"] else "") for d in made]
        counts = f"{record['trainable_parameters']:,} of {record['parameters']:,} parameters train"
        where = f"epoch {record['epoch']}" + (f", step {self.state.progress.step}" if self.state.progress.step else "")
        self.screen.say(f"phase {record['phase']} from {where}: {'; '.join(why) or 'start'}; {counts}")

    def _forecast(self) -> dict[str, int] | None:
        """What a step of the phase costs, on the rank that writes the records; None where it cannot be forecast."""
        plan = self.state.phase.plan
        if plan.measure is None or not self._strategy.ranks.first:
            return None
        with suppress(CostError):
            cost = plan.measure(plan.module, plan.graph, [effects for effects in plan.effects if effects is not None])
            return {figure.name: getattr(cost, figure.name) for figure in FIGURES}
        return None

    def start_window(self) -> None:
        self._lap = time.perf_counter(), self.state.progress.total

    def window(self, rate: float, steps: int) -> str:
        """The figures of the last `steps` steps, of all ranks; returns a short text for the progress bar."""
        self._strategy.synchronize()
        (start, first), window = self._lap, self.state.window.over(self._strategy.peers)
        seconds = (time.perf_counter() - start) / max(1, self.state.progress.total - first)
        speed, peak = window.samples / steps / seconds if seconds else 0.0, self._peak(self._strategy.peers)
        figures = {"loss": window.loss, "accuracy": window.accuracy, "lr": rate, "step_seconds": seconds, "samples_per_second": speed}
        if self.state.phase.plan.needs.targets:
            figures["local_loss"] = window.local_loss
        self.write("step", phase=len(self.state.phases) - 1, **figures, peak_bytes=peak)
        self.state.window = Meter()
        self.start_window()
        return f"loss {window.loss:.4f}"

    def _peak(self, ranks: Ranks) -> int:
        """The peak memory of the rank that needs most."""
        return int(ranks.largest(self._strategy.peak_memory()))

    def epoch(
        self,
        figures: Mapping[str, float],
        change: Mapping[str, float],
        samples: int,
        seconds: float,
        chain: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """The figures of an epoch, how much the weights of scored regions changed in it, its samples, and how long it took.

        `chain` has what each rank of a chain did. Returns the peak memory so far of the rank that needs most, in bytes.
        """
        speed, peak = samples / max(seconds, 1e-9), self._peak(self._strategy.ranks)
        more: dict[str, Any] = {
            "seconds": seconds,
            "samples_per_second": speed,
            "peak_bytes": peak,
            **({"change": change} if change else {}),
            **({"chain": chain} if chain else {}),
        }
        record = self.write("epoch", phase=len(self.state.phases) - 1, **figures, **more)
        parts = [f"loss {figures['train_loss']:.4f}"]
        if "train_local_loss" in figures:
            parts.append(f"local losses {figures['train_local_loss']:.4f}")
        for name, label in (("accuracy", "accuracy"), ("ema_accuracy", "averaged weights")):
            if name in figures:
                parts.append(f"{label} {100 * figures[name]:.2f} %")
        parts += [f"{seconds:.1f} s", f"{speed:.0f} images/s", *([f"peak {show_size(peak)}"] if peak else [])]
        self.screen.say(f"{self.screen.at(record['epoch'])}: {', '.join(parts)}")
        return peak
