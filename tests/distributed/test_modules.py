"""A chain of ranks, each with some of the modules, trains what one process trains, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import graphopt
from graphopt import Pass, Plan
from graphopt.data.loader import Data, open_data
from graphopt.models import cifar_resnet
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.spec import DataSpec
from graphopt.train import train
from tests.distributed import cases
from tests.support.backbones import Small
from tests.support.ranks import run_ranks
from tests.train import small

ADAMW = {"name": "adamw", "lr": 0.003}
CUTS = ("blocks.0", "blocks.1", "blocks.2")


@dataclass(frozen=True)
class Case:
    """A backbone, the side of its images, passes, and settings that differ from the usual ones."""

    make: Callable[[], nn.Module]
    passes: tuple[Pass, ...] = (Supervise(cuts=CUTS),)
    settings: dict[str, Any] = field(default_factory=dict)
    side: int = 8


def _vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10, proj_drop_rate=0.1, drop_path_rate=0.2)


def _swin() -> nn.Module:
    sizes = {"img_size": 28, "window_size": 7, "embed_dim": 12, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=10, drop_path_rate=0.2)


_resnet = partial(cifar_resnet.build, "resnet14", num_classes=10)
CASES = {
    "resnet": Case(_resnet, (Supervise(modules=4),)),
    "image decoder": Case(_resnet, (Supervise(modules=4, decoder="image", head="conv"),)),
    "ema, micro-batches, agc": Case(Small, settings={"ema": 0.9, "accumulate": 2, "clip": 0.01, "clip_mode": "agc", "epochs": 2}),
    "bfloat16, channels last": Case(Small, settings={"amp": "bfloat16", "channels_last": True}),
    "vit with dropout": Case(_vit, (Supervise(modules=3),), {"optimizer": ADAMW, "epochs": 2}, side=16),
    "clipped by module": Case(Small, settings={"clip": 0.1, "clip_mode": "module"}),
    "freeze, thaw": Case(
        Small,
        (
            Supervise(cuts=CUTS),
            Freeze(select=["stem", "blocks.0"], when={"epoch": 1}),
            Freeze(select="blocks.1", when={"epoch": 1, "until": 2}),
        ),
        {"epochs": 3, "ema": 0.9, "optimizer": ADAMW},
    ),
    "frozen by score": Case(
        Small,
        (Supervise(cuts=CUTS), Freeze(select=["stem", "blocks.0", "blocks.1"], when={"score": "change", "below": 10.0})),
        {"epochs": 3},
    ),
    "supervise, then not": Case(Small, (Supervise(cuts=CUTS, when={"epoch": 0, "until": 1}),), {"epochs": 2}),
    "swin": Case(_swin, (Supervise(balance="stage"),), {"optimizer": ADAMW}, side=28),
}


def _plan(case: Case, seed: int = 0) -> Plan:
    torch.manual_seed(seed)
    return graphopt.compile(case.make(), list(case.passes), input=(3, case.side, case.side), verify="off", costs=False)


def _data(case: Case) -> Data:
    return open_data(DataSpec(name="digits", train_limit=72, eval_limit=25), (3, case.side, case.side), seed=0)


def _run(name: str, folder: Path, strategy: str = "auto", **more: Any) -> None:
    case = CASES[name]
    settings = {"epochs": 1, "batch": 12, "strategy": strategy, "log_every": 2, **case.settings, **more}
    train(_plan(case), folder / name, settings=small.settings(**settings), data=_data(case))


def _all(_rank: int, folder: Path) -> None:
    for name in CASES:
        try:
            _run(name, folder, "modules")
        except Exception as error:
            raise RuntimeError(name) from error


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in CASES:
        _run(name, folder)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_chain_trains_what_one_process_trains(tmp_path: Path, alone: Path, ranks: int) -> None:
    run_ranks(_all, tmp_path, ranks=ranks)
    for name in CASES:
        same_run(tmp_path / name, alone / name)


def same_run(one: Path, other: Path) -> None:
    """Whether two runs have the same checkpoint, whichever ranks wrote it, and the same figures."""
    found, expected = cases.content(one), cases.content(other)
    for key in ("phase", "history", "decisions", "meter", "buffers", "progress"):
        if key == "progress":
            for clock in ("seconds", "epoch_began", "peak_bytes"):
                found[key].pop(clock), expected[key].pop(clock)
        assert same(found[key], expected[key], key), (one, key)
    for kind, figures in (("step", ("loss", "accuracy", "lr")), ("epoch", ("loss", "accuracy", "train_loss", "train_accuracy"))):
        told, known = (small.records(folder, kind) for folder in (one, other))
        assert [[r[f] for f in figures] for r in told] == [[r[f] for f in figures] for r in known], one
    assert (one / "ledger.bin").read_bytes() == (other / "ledger.bin").read_bytes()


def same(one: Any, other: Any, path: str) -> bool:
    """Whether nested states are equal, bit for bit, with the same names."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (path, one.keys() ^ other.keys())
        return all(same(one[k], other[k], f"{path}/{k}") for k in one)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
        return True
    assert one == other, path
    return True
