"""The records of a run: metrics.jsonl, TensorBoard and the console."""

import time
from collections.abc import Mapping
from typing import Any

from graphopt.compiler.triggers import Decision
from graphopt.train.metrics import Meter, MetricsLog
from graphopt.train.optimizer import parameter_counts
from graphopt.train.screen import Screen
from graphopt.train.state import RunState
from graphopt.train.strategy import Strategy


class RunLog:
    """Writes the records of a run.

    Attributes:
        metrics: metrics.jsonl. screen: the console.
    """

    def __init__(self, state: RunState, metrics: MetricsLog, screen: Screen, strategy: Strategy) -> None:
        self.state, self.metrics, self.screen, self._strategy = state, metrics, screen, strategy
        self._lap = time.perf_counter(), 0

    def _write(self, kind: str, **figures: Any) -> dict[str, Any]:
        progress = self.state.progress
        record = {"kind": kind, "step": progress.total, "epoch": progress.epoch, **figures}
        self.metrics.write(record)
        return record

    def resumed(self) -> None:
        """A run that continues."""
        progress = self.state.progress
        self._write("resume")
        self.screen.say(f"resumes at epoch {progress.epoch + 1}, step {progress.step}")

    def phase(self, decisions: tuple[Decision, ...]) -> None:
        """A new phase, and the decisions that began it."""
        plan = self.state.phase.plan
        record = self._write(
            "phase",
            phase=len(self.state.phases),
            decisions=[{**d.model_dump(mode="json"), "pass": plan.passes[d.index].name} for d in decisions],
            **parameter_counts(plan.module),
        )
        self.state.phases.append({key: record[key] for key in ("phase", "epoch", "step", "decisions")})
        self.screen.phase(record)

    def features(self, decision: Mapping[str, Any]) -> None:
        """What the feature cache has decided."""
        self._write("features", **decision)

    def start_window(self) -> None:
        """Starts to measure the time of steps."""
        self._lap = time.perf_counter(), self.state.progress.total

    def window(self, rate: float, steps: int) -> str:
        """The figures of the last `steps` steps; returns a short text for the progress bar."""
        self._strategy.synchronize()
        (start, first), window = self._lap, self.state.window
        seconds = (time.perf_counter() - start) / max(1, self.state.progress.total - first)
        self._write(
            "step",
            phase=len(self.state.phases) - 1,
            loss=window.loss,
            accuracy=window.accuracy,
            lr=rate,
            step_seconds=seconds,
            samples_per_second=window.samples / steps / seconds if seconds else 0.0,
            peak_bytes=self._strategy.peak_memory(),
        )
        self.state.window = Meter()
        self.start_window()
        return f"loss {window.loss:.4f}"

    def epoch(self, figures: Mapping[str, float], change: Mapping[str, float], seconds: float) -> None:
        """The figures of an epoch, how much the weights of scored regions changed in it, and how long it took."""
        record = self._write(
            "epoch",
            phase=len(self.state.phases) - 1,
            **figures,
            seconds=seconds,
            samples_per_second=self.state.meter.samples / max(seconds, 1e-9),
            peak_bytes=self.state.progress.peak_bytes,
            **({"change": change} if change else {}),
        )
        self.screen.epoch(record)
