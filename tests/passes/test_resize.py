"""resize: phases on images of another size, with the same parameters."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt import Pass, PassError, Plan, RunError
from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import ImageNeeds
from graphopt.data.loader import open_data
from graphopt.data.transforms import LowFrequency
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.resize import Resize
from graphopt.passes.supervise import Supervise
from graphopt.planning.run_cost import forecast_run
from graphopt.spec import AugmentSpec
from graphopt.train import Stopped, run, train
from graphopt.train.evaluation import SUMS
from graphopt.train.phase import Phase
from tests.support.backbones import Small
from tests.train import small

FIRST = Resize(size=4, when={"epoch": 0, "until": 1})
SECOND = Resize(size=6, how="low-frequency", augment={"hflip": 0.5}, when={"epoch": 1, "until": 2})


def inputs(plan: Plan, epochs: int = 3) -> list[Any]:
    return [(phase.start, phase.plan.base.input, phase.plan.graph.input) for phase in plan.phases(epochs)]


def test_each_phase_has_its_input_and_says_what_images_it_needs() -> None:
    plan = small.plan([FIRST, SECOND, Freeze(select="blocks.0", when={"epoch": 1})])
    sizes = [(3, 4, 4), (3, 6, 6), (3, 8, 8)]
    assert inputs(plan) == [(epoch, size, size) for epoch, size in enumerate(sizes)]
    assert [phase.plan.needs.images for phase in plan.phases(3)] == [ImageNeeds(), ImageNeeds(True, {"hflip": 0.5}), None]
    assert plan.base.input == (3, 8, 8), "before a decision"


def test_a_size_from_the_start_to_the_end_is_warned_of() -> None:
    plan = small.plan([Resize(size=4)])
    assert plan.base.input == (3, 4, 4)
    assert plan.sizes.full == (3, 8, 8)
    (said,) = plan.matched[0].match.diagnostics
    assert "no epoch" in said.message
    out = plan.export()(torch.rand(2, 3, 8, 8))
    assert out.shape == (2, 10)


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([FIRST, Resize(size=6)], r"pass 2, resize: from epoch 0 on, pass 1 sets the size of the same epochs.*until"),
        ([Resize(size=9, how="low-frequency", when={"epoch": 0})], 'pass 1, resize.* 8x8 has no 9x9 frequencies.*"scale"'),
        ([Resize(size=4, augment={"mixup": 0.2})], "mixup cannot change within a run"),
    ],
)
def test_what_cannot_be_is_refused_with_the_pass(passes: list[Pass], says: str) -> None:
    with pytest.raises(PassError, match=says):
        small.plan(passes).check_phases(3)


def test_a_backbone_that_cannot_take_the_size_is_refused_before_the_run(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    plan = graphopt.compile(net, Resize(size=4, when={"epoch": 1, "until": 2}), input=small.SHAPE, verify="off", costs=False)
    with pytest.raises(graphopt.TraceError, match=r"pass 1, resize.*at 4x4"):
        train(plan, tmp_path, settings=small.settings(), data=small.DATA)
    assert not list(tmp_path.iterdir())


def test_images_made_in_code_and_unknown_augmentation_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="prepared in code, for one size"):
        train(small.plan([SECOND]), tmp_path, settings=small.settings(), data=open_data(small.DATA, small.SHAPE, 0))
    wrong = Resize(size=4, augment={"hflap": 1.0}, when={"epoch": 1, "until": 2})
    with pytest.raises(RunError, match=r"data\.augment: augment of a pass: hflap"):
        train(small.plan([wrong]), tmp_path, settings=small.settings(), data=small.DATA)


def test_a_teacher_sees_one_size(tmp_path: Path) -> None:
    teacher = {"source": "cifar", "name": "resnet8", "arguments": {"num_classes": 10}, "weights": "teacher.pt"}
    with pytest.raises(RunError, match="a teacher takes images of one size"):
        train(small.plan([FIRST]), tmp_path, settings=small.settings(distill=teacher), data=small.DATA)


def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the training batches of runs from now on, each shape once in a row."""
    seen: list[tuple[int, ...]] = []
    loss = Phase._loss

    def noted(phase: Phase, batch: Any) -> Any:
        if seen[-1:] != [tuple(batch.input.shape[1:])]:
            seen.append(tuple(batch.input.shape[1:]))
        return loss(phase, batch)

    monkeypatch.setattr(Phase, "_loss", noted)
    return seen


@pytest.mark.parametrize(
    "others",
    [
        [],
        [Freeze(select="blocks.0", when={"epoch": 1})],
        [Supervise(cuts=("blocks.1",), decoder="none")],
        [Freeze(select=("stem", "blocks.0"), when={"schedule": "freezeout"}), Supervise(cuts=("blocks.1",))],
    ],
    ids=["alone", "freeze", "supervise", "freezeout and supervise"],
)
def test_a_run_trains_at_each_size_and_exports_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[Pass]) -> None:
    seen = shapes(monkeypatch)
    plan = replace(small.plan([FIRST, SECOND, *others]), measure=measure_with(16))
    before = {name: value.clone() for name, value in plan.backbone.state_dict().items()}
    summary = train(plan, tmp_path, settings=small.settings(ema=0.9), data=small.DATA)
    assert seen == [(3, 4, 4), (3, 6, 6), (3, 8, 8)]
    after = small.weights(tmp_path)
    assert {name for name in before if "num_batches" not in name and torch.equal(before[name], after[name])} == set()
    flops = [phase["forecast"]["forward_flops"] for phase in summary.phases if phase["step"] in (0, 6, 12)]
    assert flops[0] < flops[1] < flops[2]
    assert graphopt.train.export_run(tmp_path, tmp_path / "model.pt", which="last", plan=plan) is not None
    net = Small()
    net.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def test_cached_features_are_made_anew_at_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shapes(monkeypatch)
    passes = [Resize(size=4, when={"epoch": 0, "until": 2}), Drop(upto="blocks.0", force=True, when={"epoch": 1})]
    train(small.plan(passes, drop=0.0), tmp_path, settings=small.settings(), data=small.DATA)
    assert seen == [(3, 4, 4), (8, 4, 4), (8, 8, 8)]
    assert [r["filled_from"] for r in small.records(tmp_path, "features")] == ["images", "images"]


@pytest.mark.parametrize("after", [5, 8])
def test_a_run_that_was_stopped_goes_on_at_the_size_of_its_phase(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, settings = [FIRST, SECOND], small.settings()
    train(small.plan(passes), tmp_path / "whole", settings=settings, data=small.DATA)
    step = Phase.step

    def stopping(phase: Phase, batches: Any, done: int) -> Any:
        if done == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(phase, batches, done)

    monkeypatch.setattr(Phase, "step", stopping)
    with pytest.raises(Stopped):
        train(small.plan(passes), tmp_path / "run", settings=settings, data=small.DATA)
    monkeypatch.undo()
    train(small.plan(passes, seed=7), tmp_path / "run", settings=settings, data=small.DATA, resume=True)
    assert small.same(small.weights(tmp_path / "run"), small.weights(tmp_path / "whole"))


def test_the_forecast_has_every_phase_and_evaluation_at_its_size() -> None:
    plan = graphopt.compile(Small(drop=0.0), [FIRST], input=small.SHAPE, batch=4)
    cost = forecast_run(plan, small.settings(epochs=3, batch=4), samples=40, evaluated=20)
    first, rest = cost.phases
    assert (first.epochs, rest.epochs) == (1, 2)
    # A quarter of the pixels: the convolutions' FLOPs go with them, the linear layer's do not.
    linear = 40 * 2 * 8 * 10
    assert first.forward_flops - linear == (rest.forward_flops - linear) // 4
    assert cost.before.training_forward_flops == 3 * rest.forward_flops
    assert cost.run.training_forward_flops == first.forward_flops + 2 * rest.forward_flops
    # Half as many images are evaluated as trained on, after each epoch.
    assert cost.run.evaluation_forward_flops == cost.run.training_forward_flops // 2
    assert cost.before.evaluation_forward_flops == cost.before.training_forward_flops // 2


def test_the_report_compares_with_the_backbones_own_size() -> None:
    report = graphopt.compile(Small(drop=0.0), [Resize(size=4)], input=small.SHAPE, batch=4).report
    assert report.before is not None
    assert report.after is not None
    assert report.after.forward_flops < report.before.forward_flops / 3.5
    assert report.passes[0].before == report.before


def test_low_frequencies_are_kept_as_they_are() -> None:
    """A wave below the cut is the same wave in fewer pixels; one above it is gone; the mean stays."""

    def wave(pixels: int, times: int) -> Tensor:
        return torch.cos(2 * torch.pi * times * torch.arange(pixels) / pixels).expand(1, pixels, pixels)

    cut = LowFrequency(8, 8)
    assert torch.allclose(cut(wave(16, 2) + 0.5), wave(8, 2) + 0.5, atol=1e-6)
    assert torch.allclose(cut(wave(16, 6)), torch.zeros(1, 8, 8), atol=1e-6)
    image = torch.rand(3, 16, 12)
    assert LowFrequency(8, 4)(image).shape == (3, 8, 4)
    assert torch.allclose(LowFrequency(16, 12)(image), image, atol=1e-6)


def test_weaker_augmentation_comes_with_the_phase(tmp_path: Path) -> None:
    data = small.DATA.model_copy(update={"augment": AugmentSpec(hflip=1.0)})
    plain = Resize(size=8, augment={"hflip": 0.0}, when={"epoch": 0, "until": 1})
    for name, passes, given in (("never", [], small.DATA), ("weak", [plain], data), ("strong", [], data)):
        train(small.plan(passes, drop=0.0), tmp_path / name, settings=small.settings(epochs=1), data=given)
    never, weak, strong = (small.weights(tmp_path / name) for name in ("never", "weak", "strong"))
    assert small.same(never, weak)
    assert not small.same(weak, strong)


def test_accuracies_at_two_sizes_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch, on small images, is made the best of all."""
    evaluate, figures = run.evaluate, iter([0.9, 0.2, 0.3])

    def claimed(*arguments: Any, **options: Any) -> Any:
        meter, accuracy = evaluate(*arguments, **options), next(figures)
        meter.sums[SUMS.index("correct")] = accuracy * meter.samples
        return meter

    monkeypatch.setattr(run, "evaluate", claimed)
    summary = train(small.plan([FIRST]), tmp_path, settings=small.settings(), data=small.DATA)
    assert (summary.best_epoch, summary.best_accuracy) == (2, 0.3)


def test_a_plan_that_begins_at_another_size_trains_on_its_low_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shapes(monkeypatch)
    plan = small.plan([Resize(size=4, how="low-frequency")])
    train(plan, tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    assert seen == [(3, 4, 4)]
