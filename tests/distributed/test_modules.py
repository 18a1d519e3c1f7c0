"""A chain of ranks, each with some of the modules, trains what one process trains, bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt import Plan, RunError
from graphopt.passes.adapt import Adapt
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from graphopt.passes.resize import Resize
from graphopt.passes.supervise import Supervise
from graphopt.train import Stopped, modules
from graphopt.train.phase import Phase
from graphopt.train.transport import Transport
from tests.support.backbones import Small
from tests.support.ranks import run_process

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import modules_equal
import modules_killed

# All ranks of a test are forked from a process that has compiled their plans, which takes as long as to train them.


def in_process(function: Callable[[Path], None], folder: Path) -> None:
    assert run_process(function, folder, timeout=600) == 0


PLAIN, RESNET, VIT, SWIN, HALF, THAWED, SCORED, CACHED = modules_equal.CASES


def _compare(folder: Path, ranks: tuple[int, ...], names: list[str], steps: int) -> None:
    for name, found in modules_equal.compare({name: modules_equal.CASES[name] for name in names}, folder / str(ranks), ranks, steps):
        assert found.steps == steps
        assert found.tensors > 30
        assert found.differing == {count: [] for count in ranks}, name


def _backbones(folder: Path) -> None:
    _compare(folder, (2, 3), [RESNET], 4)


def _device_transport(folder: Path) -> None:
    """Tensors travel in groups of their own, as by NCCL, but on the CPU."""
    Transport.of = lambda device, ranks: Transport(device, "gloo")  # type: ignore[method-assign]  # of this process, for one test
    _compare(folder, (3,), [VIT, SWIN], 4)
    assert "activations by gloo" in (folder / "(3,)" / "3" / VIT / "summary.json").read_text()


def _phases(folder: Path) -> None:
    _compare(folder, (2,), [THAWED, HALF, CACHED], 6)
    _compare(folder, (3,), [SCORED], 6)


#: running means of blocks that another rank trains, also of the rank after the next, while one of them rests
FOLLOWED = "running means of the next module's weights"
LOOKAHEAD = modules_equal.Case(
    Small,
    (
        Supervise(cuts=("stem", "blocks.0"), decoder="none", lookahead={"blocks": 2, "ema": 0.75}),
        Freeze(select="stem", when={"epoch": 1}),
    ),
    {"epochs": 2, "accumulate": 2, "checkpoint_steps": 1},
)


def _followed(folder: Path) -> None:
    for name, found in modules_equal.compare({FOLLOWED: LOOKAHEAD}, folder, (3,), 6):
        assert found.differing == {3: []}, name


#: phases of three sizes of images, and passes that change layers of several modules
COMPOSED = modules_equal.Case(
    modules_equal.RESNET,
    (
        Supervise(modules=3),
        Resize(size=8, when={"epoch": 0, "until": 1}),
        Resize(size=12, how="low-frequency", when={"epoch": 1, "until": 2}),
        BlurPool(),
        GhostNorm(samples=2),
        Factorize(select="layer2", rank=0.5, when={"epoch": 1}),
        Adapt(select="layer3.0", rank=2, when={"epoch": 2}),
    ),
    {"epochs": 3, "ema": 0.9},
    (3, 16, 16),
)


def _composed(folder: Path) -> None:
    for name, found in modules_equal.compare({"sizes": COMPOSED}, folder, (2,), 6):
        assert found.differing == {2: []}, name


@pytest.mark.parametrize("function", [_backbones, _device_transport, _phases, _followed, _composed])
def test_a_chain_trains_what_one_process_trains(tmp_path: Path, function: Callable[[Path], None]) -> None:
    in_process(function, tmp_path)


STOPPED = modules_equal.Case(
    modules_equal.small_run.backbone,
    (Supervise(cuts=("stem", "one"), decoder="none", lookahead={"blocks": 1, "ema": 0.5}),),
    {"epochs": 2, "ema": 0.9, "checkpoint_steps": 2, "optimizer": modules_equal.ADAMW},
    modules_equal.GRAY,
)
STEPS = 8
HOWS = ("by the first stage", "by the last stage", "by an error")


class Failed(Exception):
    """What one rank's step raises."""


def _disturbed(plan: Plan, folder: Path, how: str) -> None:
    """Trains until a rank gets a stop signal, or fails, before its third step."""
    rank, step, modules.LOOK = int(os.environ["RANK"]), Phase.step, 0.0
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
            modules_equal.run(plan, STOPPED, folder / how, "modules", STEPS)
    finally:
        Phase.step = step  # type: ignore[method-assign]  # graphopt's own again
    if how != "by an error":
        assert isinstance(ended.value, Stopped)
        assert ended.value.exit_code == 143
    (folder / f"{how} {rank}").write_text(f"{type(ended.value).__name__} {getattr(ended.value, 'silent', False)}")


def _three(plans: list[Plan], folder: Path) -> None:
    for plan, how in zip(plans, HOWS, strict=True):
        _disturbed(plan, folder, how)


def _resumed(plans: list[Plan], folder: Path, hows: tuple[str, ...]) -> None:
    for plan, how in zip(plans, hows, strict=True):
        modules_equal.run(plan, STOPPED, folder / how, "modules", STEPS, resume=True)


def _alone(plan: Plan, folder: Path) -> None:
    modules_equal.run(plan, STOPPED, folder, "auto", STEPS)


def _stop_and_go_on(folder: Path) -> None:
    plans, others = ([modules_equal.plan_of(STOPPED, seed) for _ in HOWS] for seed in (0, 1))
    assert modules_equal.in_ranks(3, _three, plans, folder) == [0] * 3
    for how in HOWS:
        done = torch.load(folder / how / "last.pt", weights_only=True)["progress"]["total"]
        assert 0 < done < STEPS, how
        told = [(folder / f"{how} {rank}").read_text() for rank in range(3)]
        assert sum("True" not in text for text in told) == 1, "one rank tells it"
    # Of the plan's own weights nothing is left.
    assert modules_equal.in_ranks(2, _resumed, others[1:], folder, HOWS[1:]) == [0] * 2
    assert modules_equal.in_ranks(1, _resumed, others[:1], folder, HOWS[:1]) == [0]
    assert modules_equal.in_ranks(1, _alone, plans[0], folder / "undisturbed") == [0]
    expected = modules_equal.content(folder / "undisturbed")
    for how in HOWS:
        assert not modules_equal.differing(modules_equal.content(folder / how), expected), how


def test_a_chain_that_stops_or_fails_goes_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    """Three ranks begin; two ranks, or one process, finish what an undisturbed process does."""
    in_process(_stop_and_go_on, tmp_path)


def _kill_and_go_on(folder: Path) -> None:
    plan = modules_equal.plan_of(modules_killed.CASE)
    expected = modules_killed.undisturbed(plan, folder / "undisturbed")
    kill = modules_killed.Kill(rank=1, step=3, moment=modules_killed.CHECKPOINT)
    assert kill in modules_killed.every_kill()
    assert modules_killed.differing(plan, kill, folder, expected, (2,)) == {2: []}


def test_a_chain_of_which_a_rank_is_killed_goes_on_with_fewer(tmp_path: Path) -> None:
    """One of those that `tools/modules_killed.py` kills."""
    in_process(_kill_and_go_on, tmp_path)


REPLICATED = modules_equal.Case(
    Small,
    (Drop(upto="blocks.0", when={"epoch": 1}, force=True), Supervise(cuts=("blocks.0", "blocks.1"))),
    {"epochs": 2, "ema": 0.9, "accumulate": 2},
)
CHAINS = REPLICATED._replace(settings=REPLICATED.settings | {"replicas": 2})


def _two_networks(plan: Plan, folder: Path) -> None:
    modules_equal.run(plan, REPLICATED, folder, "ddp", STEPS)


def _two_chains(plans: list[Plan], folder: Path) -> None:
    """Trains, stops by a signal that the second chain alone gets, and goes on."""
    step = Phase.step

    def stopped(phase: Phase, batches: Any, done: int) -> Any:
        if os.environ["RANK"] == "3" and done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(phase, batches, done)

    Phase.step = stopped  # type: ignore[method-assign]  # of this process, for one test
    with pytest.raises(Stopped):
        modules_equal.run(plans[0], CHAINS, folder, "modules", STEPS)
    Phase.step = step  # type: ignore[method-assign]  # graphopt's own again
    modules_equal.run(plans[1], CHAINS, folder, "modules", STEPS, resume=True)


def _side_by_side(folder: Path) -> None:
    plans = [modules_equal.plan_of(REPLICATED) for _ in range(2)]
    assert modules_equal.in_ranks(2, _two_networks, plans[0], folder / "networks") == [0] * 2
    assert modules_equal.in_ranks(4, _two_chains, plans, folder / "chains") == [0] * 4
    assert not modules_equal.differing(*(modules_equal.content(folder / name) for name in ("chains", "networks")))


def test_two_chains_side_by_side_train_what_two_whole_networks_train(tmp_path: Path) -> None:
    """Batch norms and dropout are those of two processes with half of the batch each."""
    in_process(_side_by_side, tmp_path)
