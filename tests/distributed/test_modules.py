"""A chain of ranks, each with some of the modules, trains what one process trains, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import graphopt
from graphopt import Pass, Plan, RunError
from graphopt.models import cifar_resnet
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.spec import DataSpec
from graphopt.train import Stopped, modules, train
from graphopt.train.phase import Phase
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
    augment: dict[str, Any] = field(default_factory=dict)


def _vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10, proj_drop_rate=0.1, drop_path_rate=0.2)


def _swin() -> nn.Module:
    sizes = {"img_size": 28, "window_size": 7, "embed_dim": 12, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=10, drop_path_rate=0.2)


HARD = {"ema": 0.9, "accumulate": 2, "clip": 0.01, "clip_mode": "agc"}
CASES = {
    "resnet, image decoder": Case(
        partial(cifar_resnet.build, "resnet14", num_classes=10), (Supervise(modules=4, decoder="image", head="conv"),), HARD
    ),
    "half precision, mixup": Case(
        Small,
        settings={"amp": "bfloat16", "channels_last": True, "clip": 0.1, "clip_mode": "module"},
        augment={"mixup": 0.5, "hflip": 0.5},
    ),
    "vit with dropout": Case(_vit, (Supervise(modules=3),), {"optimizer": ADAMW}, side=16),
    "swin": Case(_swin, (Supervise(balance="stage"),), side=28),
    "freeze, thaw": Case(
        Small,
        (
            Supervise(cuts=CUTS),
            Freeze(select=["stem", "blocks.0"], when={"epoch": 1}),
            Freeze(select="blocks.1", when={"epoch": 1, "until": 2}),
        ),
        {"epochs": 3, "ema": 0.9, "optimizer": ADAMW, "checkpoint_async": True},
    ),
    "frozen by score, then not supervised": Case(
        Small,
        (
            Supervise(cuts=CUTS, when={"epoch": 0, "until": 2}),
            Freeze(select=["stem", "blocks.0", "blocks.1"], when={"score": "change", "below": 10.0}),
        ),
        {"epochs": 3},
    ),
    "cached features": Case(Small, (Drop(upto="blocks.1", when={"epoch": 1}, force=True), Supervise(cuts=CUTS)), {"epochs": 2, "ema": 0.9}),
}


def _plan(case: Case, seed: int = 0) -> Plan:
    torch.manual_seed(seed)
    return graphopt.compile(case.make(), list(case.passes), input=(3, case.side, case.side), verify="off", costs=False)


def _data(case: Case) -> DataSpec:
    return DataSpec.model_validate({"name": "digits", "train_limit": 72, "eval_limit": 13, "augment": case.augment})


def _run_case(case: Case, folder: Path, strategy: str, *, resume: bool = False) -> None:
    settings = {"epochs": 1, "batch": 12, "strategy": strategy, "log_every": 2, **case.settings}
    train(_plan(case, seed=int(resume)), folder, settings=small.settings(**settings), data=_data(case), resume=resume)


def _run_all(_rank: int, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            _run_case(CASES[name], folder / name, "modules")
        except Exception as error:
            raise RuntimeError(name) from error


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in CASES:
        _run_case(CASES[name], folder / name, "auto")
    return folder


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, ("resnet, image decoder", "freeze, thaw", "cached features")), (3, tuple(CASES))], ids=["2 ranks", "3 ranks"]
)
def test_a_chain_trains_what_one_process_trains(tmp_path: Path, alone: Path, ranks: int, names: Sequence[str]) -> None:
    run_ranks(_run_all, tmp_path, names, ranks=ranks)
    for name in names:
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


STOPPED = Case(Small, settings={"epochs": 2, "ema": 0.9, "checkpoint_steps": 2, "log_every": 1, "optimizer": ADAMW})
CASES_OF_STOPS = ("by the first stage", "by the last stage", "by an error")


class Failed(Exception):
    """What one rank's step raises."""


def _disturbed(rank: int, folder: Path, how: str) -> None:
    """Trains until a rank gets a stop signal, or fails, before its third step."""
    torch.set_num_threads(1)
    step, modules.LOOK = Phase.step, 0.0
    disturbing = {"by the first stage": 2, "by the last stage": 0, "by an error": 1}[how]

    def disturbed(phase: Phase, batches: Any, done: int) -> Any:
        if rank == disturbing and done == 2:
            if how == "by an error":
                raise Failed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(phase, batches, done)

    Phase.step = disturbed  # type: ignore[method-assign]  # of this process, for one test
    try:
        with pytest.raises((Stopped, Failed, RuntimeError, RunError)) as ended:
            _run_case(STOPPED, folder / how, "modules")
    finally:
        Phase.step = step  # type: ignore[method-assign]  # graphopt's own again
    if how != "by an error":
        assert isinstance(ended.value, Stopped)
        assert ended.value.exit_code == 143
    (folder / f"{how} {rank}").write_text(f"{type(ended.value).__name__} {getattr(ended.value, 'silent', False)}")


def _three(rank: int, folder: Path) -> None:
    for how in CASES_OF_STOPS:
        _disturbed(rank, folder, how)


def _resumed(_rank: int, folder: Path, hows: tuple[str, ...]) -> None:
    for how in hows:
        _run_case(STOPPED, folder / how, "modules", resume=True)


def test_a_chain_that_stops_or_fails_goes_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    """Three ranks begin; two ranks, or one process, finish what an undisturbed process does."""
    run_ranks(_three, tmp_path, ranks=3)
    for how in CASES_OF_STOPS:
        done = cases.content(tmp_path / how)["progress"]["total"]
        assert 0 < done < 12, how
        told = [(tmp_path / f"{how} {rank}").read_text() for rank in range(3)]
        assert sum("True" not in text for text in told) == 1, "one rank tells it"
    run_ranks(_resumed, tmp_path, CASES_OF_STOPS[1:], ranks=2)
    _run_case(STOPPED, tmp_path / CASES_OF_STOPS[0], "auto", resume=True)
    _run_case(STOPPED, tmp_path / "undisturbed", "auto")
    for how in CASES_OF_STOPS:
        same_run(tmp_path / how, tmp_path / "undisturbed")


REPLICATED = Case(
    Small,
    (Drop(upto="blocks.0", when={"epoch": 1}, force=True), Supervise(cuts=CUTS)),
    {"epochs": 2, "ema": 0.9, "accumulate": 2, "log_every": 1},
)


def _two_networks(_rank: int, folder: Path) -> None:
    _run_case(REPLICATED, folder, "ddp")


def _two_chains(rank: int, folder: Path) -> None:
    """Trains, stops by a signal that the second chain alone gets, and goes on."""
    case, step = replace(REPLICATED, settings=REPLICATED.settings | {"replicas": 2}), Phase.step

    def stopped(phase: Phase, batches: Any, done: int) -> Any:
        if rank == 3 and done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(phase, batches, done)

    Phase.step = stopped  # type: ignore[method-assign]  # of this process, for one test
    with pytest.raises(Stopped):
        _run_case(case, folder, "modules")
    Phase.step = step  # type: ignore[method-assign]  # graphopt's own again
    _run_case(case, folder, "modules", resume=True)


def test_two_chains_side_by_side_train_what_two_whole_networks_train(tmp_path: Path) -> None:
    """Batch norms and dropout are those of two processes with half of the batch each."""
    run_ranks(_two_networks, tmp_path / "networks", ranks=2)
    run_ranks(_two_chains, tmp_path / "chains", ranks=4)
    same_run(tmp_path / "chains", tmp_path / "networks")
