"""Checkpoints whose tensors are in parts, saved one after the other by one process with the functions that every rank calls."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.train.checkpoint import FORMAT_VERSION, load_checkpoint
from graphopt.train.folder import RunFolder
from graphopt.train.parts import write
from graphopt.train.ranks import Ranks

DIGEST = "d" * 16
STEPS, EVERY, BEST = 9, 3, 6


class PartsRun:
    """Stands for a run that only saves: after steps 3, 6 and 9, or up to `last`; the second is the best."""

    def __init__(self, last: int = STEPS) -> None:
        self.last = last

    def train(self, folder: Path) -> None:
        """Starts or continues in `folder`."""
        run = RunFolder.claim(folder, DIGEST, resume=True)
        done = load_checkpoint(run.last)["progress"]["total"] if run.last.exists() else 0
        run.begin(DIGEST, "")
        for step in range(done + EVERY, self.last + 1, EVERY):
            self._save(run, step)
        run.release()

    def _save(self, run: RunFolder, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        tensors: dict[tuple[str, ...], Tensor] = {("phase", "model", f"layer{n}"): torch.rand(8 << n, 16, generator=draw) for n in range(4)}
        rest: dict[str, Any] = {"model": {name: None for *_, name in tensors}, "scale": torch.rand(3, generator=draw)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none
            parts = write(run.path, step, tensors, Ranks())
        state = {"graphopt": FORMAT_VERSION, "digest": DIGEST, "progress": {"total": step}, "phase": rest, "parts": parts}
        run.save(state, best=step == BEST, keep=3, epoch=step // EVERY - 1)
