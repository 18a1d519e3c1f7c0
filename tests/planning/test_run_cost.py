"""What a run costs: sums that can be worked out by hand, and the published reductions from the specs alone."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt.cost import Rates, forecast
from graphopt.cost.attribution import Attribution
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.optimizer import state_of
from graphopt.diff.render.run import read_run
from graphopt.driver import build_backbone as build
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.drop import Drop
from graphopt.passes.supervise import Supervise
from graphopt.planning.run_cost import _evaluations, counts, drop_points, forecast_run
from graphopt.spec import DataSpec, TrainSpec, load
from graphopt.train import train
from graphopt.train.phase import Phase, RunContext
from graphopt.train.preflight import Inputs
from graphopt.train.strategy import Strategy
from tests.support.backbones import Small
from tests.train import small

TRAIN = TrainSpec(epochs=10, batch=10)


def plan_of(*passes):
    return graphopt.compile(Small(drop=0.0), list(passes), input=(3, 8, 8), verify="off", costs=False)


def work_of(plan, train_spec=TRAIN, **more):
    return forecast_run(plan, train_spec, samples=105, evaluated=20, **more)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("ends", [[10], [3, 10], [0.5, 2, 5.25, 6, 10]], ids=str)
def test_every_evaluation_is_counted_once_in_the_phase_that_its_epoch_ends_in(every, ends):
    train = TrainSpec(epochs=10, eval_every=every)
    expected = [0] * len(ends)
    for epoch in {*range(every, 11, every), 10}:
        expected[next(number for number, end in enumerate(ends) if epoch <= end)] += 1
    assert [_evaluations(train, start, end) for start, end in zip([0, *ends], ends, strict=False)] == expected


def test_a_billion_epochs_are_forecast_as_soon_as_ten():
    long = TrainSpec(epochs=10**9, batch=10)
    few, many = work_of(plan_of()), work_of(plan_of(), long)
    assert many.run.evaluation_forward_flops == 10**8 * few.run.evaluation_forward_flops
    assert many.run.backward_flops == 10**8 * few.run.backward_flops


def test_without_passes_a_run_is_its_steps_and_evaluations():
    work = work_of(plan_of())
    step = forecast(Small(drop=0.0), (3, 8, 8), 10)
    assert work.before == work.run
    assert work.run.training_forward_flops == 10 * 10 * step.forward_flops, "105 images are 10 whole batches"
    assert work.run.backward_flops == 10 * 10 * step.backward_flops
    assert work.run.evaluation_forward_flops == 10 * 2 * step.forward_flops
    assert work.run.forward_flops == work.run.training_forward_flops + work.run.evaluation_forward_flops
    assert work.forward_saved == 0.0


def test_time_and_peak_are_the_steps():
    step = forecast(Small(drop=0.0), (3, 8, 8), 10, **TRAIN.forecast_options())
    rates = Rates(flop=1e-9, byte=1e-9, kernel=1e-4, error=0.0, device="cpu")
    plain = work_of(plan_of(), rates=rates)
    assert work_of(plan_of()).run.seconds is None
    assert plain.run == plain.before
    assert plain.run.peak_bytes == step.peak_bytes
    assert plain.phases[0].seconds == pytest.approx(10 * rates.seconds(step))
    assert plain.run.seconds > 100 * rates.seconds(step), "evaluation takes time too"
    dropped = work_of(plan_of(Drop(upto="blocks.1", when={"epoch": 4})), rates=rates)
    assert dropped.before.seconds == plain.run.seconds
    assert dropped.run.seconds < plain.run.seconds
    assert dropped.run.peak_bytes == step.peak_bytes, "the first phase's is the largest"
    assert dropped.phases[1].step.peak_bytes < step.peak_bytes


@pytest.mark.parametrize("passes", [(), (Supervise(modules=2),)], ids=["end to end", "supervised"])
def test_the_peak_is_that_of_the_runners_own_step(tmp_path, passes):
    spec = small.settings(epochs=1, batch=24, accumulate=3, optimizer={"name": "adamw", "lr": 0.01})
    plan = small.plan(passes)
    inputs = Inputs.open(spec, small.DATA, plan.base.input, Strategy.of(spec))
    features = inputs.features(tmp_path, "", {})
    phase = Phase(plan, RunContext(spec, inputs.strategy, inputs.feeds, inputs.data.classes, None, features))
    phase.begin()
    phase.train_mode()
    phase.step(inputs.feeds.images.batches(0), 0)
    phase.optimizer.zero_grad(set_to_none=True)
    read = [*inputs.feeds.images.batches(1)]  # batches that the loader reads ahead are not the step's
    ledger, batches = Ledger(Attribution()), (type(batch)(*(tensor.clone() for tensor in batch)) for batch in read)
    ledger.set_kind([*plan.module.parameters(), *plan.module.buffers(), *state_of(phase.optimizer)], Kind.PARAMETER)
    with ledger:
        phase.step(batches, 1)
    ledger.close()
    run = forecast_run(plan, spec, samples=96, evaluated=40)
    single = forecast_run(plan, spec.model_copy(update={"batch": 8, "accumulate": 1}), samples=96, evaluated=40)
    assert run.run.training_forward_flops == single.run.training_forward_flops
    assert ledger.peak()[0] == pytest.approx(run.run.peak_bytes, abs=500)
    assert run.run.peak_bytes > single.run.peak_bytes + 1000


def test_a_dropped_prefix_is_computed_once_and_trained_no_more():
    whole = forecast(Small(drop=0.0), (3, 8, 8), 10)
    work = work_of(plan_of(Drop(when={"epoch": 4, "upto": "blocks.1"})))
    first, second = work.phases
    assert (first.epochs, second.epochs) == (4, 6)
    prefix = whole.forward_flops - second.forward_flops // 10
    assert 0.5 < prefix / whole.forward_flops < 0.6, "the stem and two of four blocks"
    assert work.run.filling_forward_flops == prefix * 105 // 10, "every sample once"
    assert work.run.forward_flops == 100 * whole.forward_flops - 60 * prefix + work.run.filling_forward_flops + 20 * whole.forward_flops
    assert second.feature_bytes == 105 * 8 * 8 * 8 * 4
    assert work.run.backward_flops < work.before.backward_flops


def test_a_later_cache_is_filled_from_the_earlier():
    one = work_of(plan_of(Drop(when={"epoch": 2, "upto": "blocks.1"}))).run.filling_forward_flops
    two = work_of(plan_of(Drop(when=[{"epoch": 1, "upto": "blocks.0"}, {"epoch": 2, "upto": "blocks.1"}]))).run.filling_forward_flops
    assert one == two


@pytest.mark.parametrize(
    ("options", "fills", "runs"),
    [({"cache": "none"}, 0, True), ({"limit": "64 KiB"}, 0, True), ({"views": 3}, 3, False), ({}, 1, False)],
    ids=["no cache", "over the limit", "three views", "cached"],
)
def test_without_a_cache_the_prefix_runs_every_step(options, fills, runs):
    plain = work_of(plan_of(Drop(upto="blocks.1", when={"epoch": 4})))
    work = work_of(plan_of(Drop(upto="blocks.1", when={"epoch": 4}, **options)))
    assert work.run.filling_forward_flops == fills * plain.run.filling_forward_flops
    assert (work.run.training_forward_flops == work.before.training_forward_flops) is runs
    assert work.run.backward_flops == plain.run.backward_flops


def test_blocks_skipped_at_random_cost_what_they_cost_on_average():
    plan = plan_of(Drop(mode="bypass", probability=0.5))
    whole = forecast(plan.module, (3, 8, 8), 10)
    rows = {row.path: row.forward_flops for row in whole.by([f"blocks.{i}" for i in range(4)])}
    expected = whole.forward_flops - sum(0.125 * (i + 1) * rows[f"blocks.{i}"] for i in range(4))
    rates = Rates(flop=1e-9, byte=1e-9, kernel=1e-4, error=0.0, device="cpu")
    work = work_of(plan, rates=rates)
    assert work.phases[0].forward_flops == 10 * round(expected)
    assert work.phases[0].seconds < 10 * rates.seconds(work.phases[0].step)


def test_scores_are_summed_up_from_a_finished_run(tmp_path):
    spec_text = """
name = "scored"
[backbone]
source = "cifar"
name = "resnet8"
arguments = { in_chans = 1 }
input = [1, 8, 8]
[[pass]]
use = "drop"
when = { score = "change", below = 100.0, patience = 1 }
upto = "layer2"
[data]
name = "digits"
train_limit = 64
eval_limit = 16
[train]
epochs = 3
batch = 16
"""
    path = tmp_path / "scored.toml"
    path.write_text(spec_text)
    spec = load(path)
    train(spec, tmp_path / "run")
    decisions = read_run(tmp_path / "run").decisions
    assert [d.regions[-1] for d in decisions] == ["layer2"]
    assert decisions[0].epoch > 0

    from graphopt.cli import app

    before, after = (json.loads(CliRunner().invoke(app, ["check", str(what), "--json"]).stdout) for what in (path, tmp_path / "run"))
    assert not before["run_complete"]
    assert before["run"] == before["run_before"], "nothing is known of it yet"
    assert after["run"]["forward_flops"] < after["run_before"]["forward_flops"]
    assert after["run_complete"]
    assert after["drop_points"][0]["bytes"]["float16"] == 64 * 16 * 8 * 8 * 2


def test_drop_points_have_the_size_that_was_published():
    """VGG-11 at 32 px in fp16, after 2, 4 and 6 units: 16, 8 and 4 KiB an image."""
    from graphopt import trace

    points = drop_points(trace(cifar.build("vgg11"), (3, 32, 32), compare=False))
    assert [points[i].bytes_per_sample // 2 for i in (1, 3, 5)] == [16384, 8192, 4096]


def test_a_replayed_schedule_saves_what_was_published():
    """arXiv 2604.23403: forward FLOPs averaged over the run; here with evaluation and filling counted in."""
    spec = load("learn_and_drop/vgg11")
    with torch.device("meta"):
        model = build(spec.backbone)
    plan = graphopt.compile(model, spec, verify="off", costs=False)
    samples, evaluated = counts(spec.data)
    assert (samples, evaluated) == (50_000, 10_000)
    work = forecast_run(plan, spec.train, samples=samples, evaluated=evaluated)
    assert work.forward_saved >= 0.1783
    assert work.training_forward_saved >= 0.1783
    assert work.complete


def test_known_data_sets_have_the_size_that_is_known():
    from graphopt.data.datasets import open_split

    assert counts(DataSpec(name="digits")) == tuple(len(open_split("digits", None, s).targets) for s in ("train", "validation"))
    assert counts(DataSpec(name="CIFAR10", train_limit=100)) == (100, 10_000)
