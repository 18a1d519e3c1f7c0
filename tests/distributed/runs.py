"""Small runs in float64, in which one process and several have to compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt import Pass, Plan
from graphopt.data.loader import Data, open_data
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train
from graphopt.train.checkpoint import load_checkpoint
from tests.support.plans import compiled_anew

SHAPE = (3, 8, 8)
#: how far float64 results may be apart that are summed in another order
EXACT = 1e-12


class Block(nn.Module):
    """A residual block that depends on no other sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(2, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Stem, a parameter that the forward reads itself, four blocks, pool, linear."""

    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.stem, self.shift = nn.Conv2d(3, width, 3, padding=1), nn.Parameter(torch.zeros(width, 1, 1))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x) + self.shift).mean((2, 3)))


class Double:
    """A transform whose images are float64."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).double()


def plan(passes: Sequence[Pass]) -> Plan:
    return compiled_anew(_network, passes, SHAPE)


def _network() -> nn.Module:
    return Net().double()


def data() -> Data:
    found = open_data(DataSpec(name="digits", train_limit=24, eval_limit=13), SHAPE, seed=0)
    for split in (found.train, found.evaluation):
        split.transform = Double(split.transform)
    return found


def settings(**changes: Any) -> TrainSpec:
    optimizer = {"name": "sgd", "lr": 0.02}
    table = {"epochs": 1, "batch": 12, "optimizer": optimizer, "log_every": 2, "device": "cpu", "eval_every": 10, **changes}
    return TrainSpec.model_validate(table)


def run(folder: Path, passes: Sequence[Pass] = (), *, resume: bool = False, made: Plan | None = None, **changes: Any) -> None:
    """Trains into `folder`, in every rank that calls it; the plan may be made already."""
    train(made or plan(passes), folder, settings=settings(**changes), data=data(), resume=resume)


def on_rank(_rank: int, folder: str, passes: Sequence[Pass], changes: dict[str, Any]) -> None:
    run(Path(folder), passes, **changes)


def saved(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds of the phase."""
    content: dict[str, Any] = load_checkpoint(folder / "last.pt")["phase"]
    return content


def distance(one: Any, other: Any) -> float:
    """The largest difference of any two numbers in nested state dicts, whose structures are equal."""
    if isinstance(one, Tensor):
        assert one.shape == other.shape
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    return 0.0 if one == other else float("inf") if not isinstance(one, float) else abs(one - other)
