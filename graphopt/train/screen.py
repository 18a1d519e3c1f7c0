"""Progress of a run on the console; nothing else in the runner prints."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graphopt.units import show_size


class Screen:
    """A progress bar over the epoch and a line per epoch; silent without a console."""

    def __init__(self, console: Console | None, epochs: int) -> None:
        self._console, self._epochs = console, epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._console is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, what: str, epoch: int, total: int, done: int = 0) -> None:
        """Starts a bar of `total` steps; `what` is 'train', 'eval' or 'features'."""
        self._progress.reset(
            self._task, total=total, completed=done, description=f"epoch {epoch + 1}/{self._epochs} {what}", note="", visible=True
        )

    def step(self, note: str = "") -> None:
        """Advances the bar by one step."""
        fields: dict[str, Any] = {"note": note} if note else {}
        self._progress.update(self._task, advance=1, **fields)

    def phase(self, record: Mapping[str, Any]) -> None:
        """Prints a new phase and the decisions that began it."""
        decisions = "; ".join(
            f"{d['action']} {d['pass']}" + (f" ({', '.join(d['regions'])})" if d["regions"] else "") for d in record["decisions"]
        )
        self.say(
            f"phase {record['phase']} from epoch {record['epoch'] + 1}: {decisions or 'start'}; "
            f"{record['trainable_parameters']:,} of {record['parameters']:,} parameters train"
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Prints the figures of an epoch."""
        parts = [f"loss {record['train_loss']:.4f}"]
        if "accuracy" in record:
            parts.append(f"accuracy {100 * record['accuracy']:.2f} %")
        if "ema_accuracy" in record:
            parts.append(f"averaged weights {100 * record['ema_accuracy']:.2f} %")
        parts.append(f"{record['seconds']:.1f} s")
        parts.append(f"{record['samples_per_second']:.0f} images/s")
        parts.append(f"peak {show_size(record['peak_bytes'])}")
        self.say(f"epoch {record['epoch'] + 1}/{self._epochs}: " + ", ".join(parts))
