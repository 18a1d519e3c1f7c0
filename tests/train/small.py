"""Small runs: a few hundred digits at 8x8, a network of four blocks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt import Pass, Plan
from graphopt.data.loader import Data, open_data
from graphopt.spec import DataSpec, TrainSpec
from tests.support.backbones import Small
from tests.support.plans import compiled_anew

SHAPE = (3, 8, 8)
DATA = DataSpec(name="digits", train_limit=96, eval_limit=40)


def plan(passes: Sequence[Pass] = (), *, seed: int = 0, drop: float = 0.3) -> Plan:
    return compiled_anew(_network(drop), passes, SHAPE, seed=seed)


@cache
def _network(drop: float) -> Callable[[], nn.Module]:
    return partial(Small, drop=drop)


def settings(**changes: Any) -> TrainSpec:
    table = {"epochs": 3, "batch": 16, "optimizer": {"name": "sgd", "lr": 0.05}, "log_every": 2, "device": "cpu", "ledger": True, **changes}
    return TrainSpec.model_validate(table)


def weights(folder: Path, name: str = "last.pt") -> dict[str, Tensor]:
    return torch.load(folder / name, weights_only=True)["phase"]["model"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def interrupting(after: int, spec: DataSpec = DATA, signum: int = signal.SIGTERM) -> Data:
    """The data, which sends this process a signal when the `after`-th training image is read."""
    data = open_data(spec, SHAPE, seed=0)
    data.train.transform = Counting(data.train.transform, after, signum)
    return data


class Counting:
    """A transform that sends this process a signal at its `after`-th image."""

    def __init__(self, transform: Callable[[Any], Tensor], after: int, signum: int = signal.SIGTERM) -> None:
        self.transform, self.left, self.signum = transform, after, signum

    def __call__(self, image: Any) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)
        return self.transform(image)
