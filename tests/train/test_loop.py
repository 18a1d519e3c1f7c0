from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt import RunError
from graphopt.data.loader import open_data
from graphopt.spec import AugmentSpec, DataSpec, TrainSpec, from_table
from graphopt.train import Stopped, train
from graphopt.train.strategy import Strategy
from tests.support.backbones import Small
from tests.train import small
from tests.train.passes import Extra, Hold, Local


def test_a_network_learns_to_read_digits(tmp_path: Path) -> None:
    spec = from_table(
        {
            "name": "reads",
            "backbone": {"source": "cifar", "name": "resnet8", "input": [3, 8, 8]},
            "data": {"name": "digits"},
            "train": {"epochs": 4, "batch": 32, "device": "cpu"},
        }
    )
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    summary = train(spec, tmp_path / "run", console=console)
    assert summary.accuracy > 0.9
    assert summary.best_accuracy >= summary.accuracy
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == summary.steps == 4 * (1442 // 32)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("run.json", "spec.toml", "last.pt", "previous.pt", "best.pt", "metrics.jsonl", "summary.json")
    }
    text = console.export_text()
    assert "epoch 3/3: loss" in text, "counted from 0, as in a spec"
    assert "phase 0 from epoch 0: start" in text


def test_metrics_tell_epochs_steps_and_phases(tmp_path: Path) -> None:
    held = Hold(select="blocks.0", when={"epoch": 1})
    train(small.plan([held]), tmp_path, settings=small.settings(), data=small.DATA)
    epochs, steps, phases = (small.records(tmp_path, kind) for kind in ("epoch", "step", "phase"))
    assert [r["epoch"] for r in epochs] == [0, 1, 2]
    assert [r["step"] for r in steps] == list(range(2, 19, 2))
    for record in steps:
        assert {"loss", "accuracy", "lr", "step_seconds", "samples_per_second", "peak_bytes", "phase"} <= record.keys()
    assert [(r["phase"], r["epoch"]) for r in phases] == [(0, 0), (1, 1)]
    assert phases[1]["decisions"] == [{"index": 0, "epoch": 1, "action": "apply", "regions": None, "pass": "hold"}]
    assert phases[1]["trainable_parameters"] < phases[0]["trainable_parameters"] == phases[0]["parameters"]
    assert [r["phase"] for r in epochs] == [0, 1, 1]


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small.plan(), tmp_path / name, settings=small.settings(epochs=1, seed=seed), data=small.DATA)
    assert small.same(small.weights(tmp_path / "a"), small.weights(tmp_path / "b"))
    assert not small.same(small.weights(tmp_path / "a"), small.weights(tmp_path / "c"))


def test_what_a_pass_holds_does_not_move(tmp_path: Path) -> None:
    plan = small.plan([Hold(select=["blocks.0", "blocks.1"])])
    before = {k: v.clone() for k, v in plan.module.state_dict().items()}
    train(plan, tmp_path, settings=small.settings(), data=small.DATA)
    after = small.weights(tmp_path)
    held = {k for k in before if k.startswith(("blocks.0", "blocks.1"))}
    assert all(torch.equal(before[k], after[k]) for k in held)
    assert all(not torch.equal(before[k], after[k]) for k in before.keys() - held if "num_batches" not in k)


def test_statistics_of_a_frozen_norm_that_move_are_an_error(tmp_path: Path) -> None:
    plan = small.plan([Hold(select="blocks.0", norms=False)])
    with pytest.raises(RunError, match=r"end of the phase: frozen, but changed.*blocks\.0\.bn1\.running_mean"):
        train(plan, tmp_path, settings=small.settings(), data=small.DATA)


def test_a_trainable_parameter_without_a_gradient_is_an_error(tmp_path: Path) -> None:
    class Cut(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.blocks(self.stem(x)).mean((2, 3)).detach())

    plan = graphopt.compile(Cut(), [], input=small.SHAPE, verify="off", costs=False)
    with pytest.raises(RunError, match=r"first step of the phase: .*without a gradient: blocks\.0"):
        train(plan, tmp_path, settings=small.settings(), data=small.DATA)


def test_a_parameter_the_forward_never_uses_is_no_error(tmp_path: Path) -> None:
    class Spare(Small):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Linear(2, 2)

    plan = graphopt.compile(Spare(), [], input=small.SHAPE, verify="off", costs=False)
    before = plan.module.state_dict()["spare.weight"].clone()
    train(plan, tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    assert torch.equal(small.weights(tmp_path)["spare.weight"], before)


def test_a_local_loss_is_added(tmp_path: Path) -> None:
    for name, passes in (("plain", []), ("local", [Local()])):
        train(small.plan(passes), tmp_path / name, settings=small.settings(epochs=1), data=small.DATA)
    plain, local = (small.records(tmp_path / name, "epoch")[0] for name in ("plain", "local"))
    assert "train_local_loss" not in plain
    assert local["train_local_loss"] > 0
    assert local["train_loss"] != plain["train_loss"], "the local loss has trained, too"
    assert not small.same(small.weights(tmp_path / "plain"), small.weights(tmp_path / "local"))


def test_auxiliary_classifiers_of_a_backbone_train_too(tmp_path: Path) -> None:
    class Two(Small):
        def __init__(self) -> None:
            super().__init__()
            self.aux = torch.nn.Linear(8, 10)

        def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def, override]
            y = self.stem(x)
            return self.fc(self.blocks(y).mean((2, 3))), self.aux(y.mean((2, 3)))

    plan = graphopt.compile(Two(), [], input=small.SHAPE, verify="off", costs=False)
    before = plan.module.state_dict()["aux.weight"].clone()
    summary = train(plan, tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    assert not torch.equal(small.weights(tmp_path)["aux.weight"], before)
    assert 0 <= summary.accuracy <= 1


def test_a_phase_brings_parameters_and_takes_them_away(tmp_path: Path) -> None:
    plan = small.plan([Extra(when={"epoch": 1, "until": 2})])
    train(plan, tmp_path, settings=small.settings(optimizer={"name": "adamw", "lr": 0.01}, ema=0.9, keep=5), data=small.DATA)
    there = [
        "blocks.0.extra" in torch.load(tmp_path / f"epoch-000{n}.pt", weights_only=True)["phase"]["optimizer"]["state"] for n in (0, 1, 2)
    ]
    assert there == [False, True, False]
    assert len(small.records(tmp_path, "phase")) == 3


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_large_batch(tmp_path: Path, accumulate: int) -> None:
    # Without norms and dropout in the way, the mean of the parts' gradients is the whole's.
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10)).double().float()
    for name, batch, parts in (("whole", 12 * accumulate, 1), ("parts", 12 * accumulate, accumulate)):
        plan = graphopt.compile(net, [], input=small.SHAPE, verify="off", costs=False)
        train(plan, tmp_path / name, settings=small.settings(epochs=1, batch=batch, accumulate=parts), data=small.DATA)
    whole, parts_ = small.weights(tmp_path / "whole"), small.weights(tmp_path / "parts")
    assert all(torch.allclose(whole[k], parts_[k], atol=1e-6) for k in whole)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    plan = small.plan()
    before = {k: v.detach().clone() for k, v in plan.module.named_parameters()}
    rate = {"name": "momentum", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    train(plan, tmp_path, settings=small.settings(epochs=1, batch=96, clip=0.01, optimizer=rate, scheduler="constant"), data=small.DATA)
    after = small.weights(tmp_path)
    moved = math.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_mixup_and_random_crops_train(tmp_path: Path) -> None:
    augment = AugmentSpec(crop="pad", mixup=0.2, cutmix=1.0)
    spec = small.DATA.model_copy(update={"augment": augment})
    summary = train(small.plan(), tmp_path, settings=small.settings(epochs=1, label_smoothing=0.1), data=spec)
    assert math.isfinite(summary.loss)


def test_averaged_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    summary = train(small.plan(), tmp_path, settings=small.settings(ema=0.9), data=small.DATA)
    assert summary.ema_accuracy is not None
    assert all("ema_accuracy" in record for record in small.records(tmp_path, "epoch"))
    state = torch.load(tmp_path / "last.pt", weights_only=True)["phase"]
    assert state["ema"].keys() == state["model"].keys()
    assert not small.same(state["ema"], state["model"])


def test_evaluation_every_few_epochs_and_always_at_the_end(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=5, eval_every=2), data=small.DATA)
    assert ["accuracy" in record for record in small.records(tmp_path, "epoch")] == [False, True, False, True, True]


def test_bfloat16_trains(tmp_path: Path) -> None:
    summary = train(small.plan(), tmp_path, settings=small.settings(epochs=1, amp="bfloat16", channels_last=True), data=small.DATA)
    assert math.isfinite(summary.loss)
    assert "bfloat16" in summary.device


def test_tensorboard_files_appear_when_asked(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=1), data=small.DATA, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_loss_that_is_not_a_number_is_one_clear_error(tmp_path: Path) -> None:
    wild = small.settings(optimizer={"name": "sgd", "lr": 1e12}, log_every=1)
    with pytest.raises(RunError, match=r"the loss became (nan|inf) at step \d+"):
        train(small.plan(), tmp_path, settings=wild, data=small.DATA)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match="--resume") as stopped:
        train(small.plan(), tmp_path, settings=small.settings(), data=small.interrupting(40, signum=signum))
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert torch.load(tmp_path / "last.pt", weights_only=True)["progress"]["total"] == 3


def test_the_wrong_number_of_classes_is_told_before_any_step(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    plan = graphopt.compile(net, [], input=small.SHAPE, verify="off", costs=False)
    with pytest.raises(RunError, match="the backbone has 5 classes, the data has 10"):
        train(plan, tmp_path, settings=small.settings(), data=small.DATA)


def test_a_batch_larger_than_the_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="one training step takes 200 images, the training set has 96"):
        train(small.plan(), tmp_path, settings=small.settings(batch=200, accumulate=2), data=small.DATA)
    assert not list(tmp_path.iterdir())


def test_missing_files_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cifar-10-batches-py"):
        train(small.plan(), tmp_path / "run", settings=small.settings(), data=DataSpec(name="cifar10", root=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_opened_data_may_be_handed_over(tmp_path: Path) -> None:
    opened = open_data(small.DATA, small.SHAPE, seed=0)
    train(small.plan(), tmp_path / "opened", settings=small.settings(epochs=1), data=opened)
    train(small.plan(), tmp_path / "named", settings=small.settings(epochs=1), data=small.DATA)
    assert small.same(small.weights(tmp_path / "opened"), small.weights(tmp_path / "named"))


def test_measured_memory_is_what_the_run_adds_and_each_phase_is_measured_anew() -> None:
    strategy = Strategy.of(TrainSpec(device="cpu"))
    module = nn.Linear(2**10, 2**12)  # 16 MiB, which count as well
    strategy.begin_memory(module)
    block = torch.ones(2**26)  # 256 MiB
    first = strategy.peak_memory()
    # Memory that the process gave back meanwhile is not in the difference.
    assert 2**28 + 2**23 <= first < 2**28 + 2**26
    del block
    strategy.reset_peak_memory()
    assert strategy.peak_memory() < first - 2**27


def test_every_generator_is_seeded_by_the_step(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        plan = small.plan()
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        train(plan, tmp_path / str(number), settings=small.settings(epochs=1), data=small.DATA)
        found.append(small.weights(tmp_path / str(number)))
    assert small.same(*found)


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is read into Python: `.item()`, `bool(tensor)`, `if tensor`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Twice as many steps read no more values: an epoch does, and a line of the log."""
    counts = []
    for images in (32, 64):
        changes = {"clip": 1.0, "ema": 0.9, "label_smoothing": 0.1, "accumulate": 2, "amp": "bfloat16", "log_every": 100, "epochs": 2}
        data = small.DATA.model_copy(update={"train_limit": images})
        with HostReads() as reads:
            train(small.plan(), tmp_path / str(images), settings=small.settings(**changes, ledger=False), data=data)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0
