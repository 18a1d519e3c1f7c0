"""How fast images come, and what binds an epoch."""

import itertools

import pytest

import graphopt
from graphopt.cost import Rates
from graphopt.cost.devices import DEVICES
from graphopt.cost.roofline import PeakRates
from graphopt.errors import RunError
from graphopt.passes.drop import Drop
from graphopt.planning.loading import LoaderRate, loader_rate, phase_times
from graphopt.planning.run_cost import forecast_run
from graphopt.spec import TrainSpec, loads
from tests.support.backbones import Small

SPEC = """
[backbone]
source = "cifar"
name = "resnet20"
arguments = { in_chans = 1 }
input = [1, 8, 8]
[data]
name = "digits"
train_limit = 40
[train]
batch = 16
"""
RATES = Rates(flop=1e-9, byte=1e-9, kernel=1e-4, error=0.0, device="cpu")


def test_the_loader_is_timed_on_the_specs_own_images():
    ticks = itertools.count()
    found = loader_rate(loads(SPEC + "[data.augment]\nhflip = 0.5\n"), seconds=3.0, now=lambda: float(next(ticks)))
    # The clock is read when it starts, after the second, third and fourth batch, and at the end.
    assert found == LoaderRate(4 * 16 / 4, 0)


def test_images_that_stay_in_memory_are_timed_in_the_first_epoch_and_in_later_ones():
    ticks = itertools.count()
    found = loader_rate(loads(SPEC), seconds=3.0, now=lambda: float(next(ticks)))
    # Of the two batches of the first epoch the second is timed; then four that are there already.
    assert found == LoaderRate(16 / 1, 0, kept=4 * 16 / 4)


def test_only_the_first_epoch_of_a_run_decodes_what_is_kept(run):
    _, cost = run
    first, _ = phase_times(cost, 10, LoaderRate(1.0, 0, kept=50.0))
    assert first.loading == pytest.approx(100 / 50.0)
    assert LoaderRate(1.0, 0, kept=50.0).of_phase(0, 1) == 1.0


def test_images_that_are_not_here_cannot_be_timed(tmp_path):
    with pytest.raises(RunError):
        loader_rate(loads(SPEC.replace('name = "digits"', f'name = "folder"\nroot = "{tmp_path}/gone"')))


@pytest.fixture(scope="module")
def run():
    drop = Drop(upto="blocks.1", when={"epoch": 4})
    plan = graphopt.compile(Small(drop=0.0), drop, input=(3, 8, 8), verify="off", costs=False)
    return plan, forecast_run(plan, TrainSpec(epochs=10, batch=10), samples=105, evaluated=20, rates=RATES)


@pytest.mark.parametrize(("speed", "binds"), [(1e-3, "loader"), (1e9, "step")])
def test_the_slower_of_step_and_loader_binds_and_features_need_no_images(run, speed, binds):
    _, cost = run
    first, second = phase_times(cost, 10, LoaderRate(speed, 2))
    assert (first.binds, second.binds) == (binds, "step")
    assert first.loading == pytest.approx(100 / speed)
    assert first.length == max(first.step, first.loading)
    assert (second.loading, second.length) == (0.0, second.step)
    alone, _ = phase_times(cost, 10, LoaderRate(speed, 0))
    assert alone.length == first.step + first.loading, "without loader processes the step waits"
    unknown, _ = phase_times(cost, 10, None)
    assert (unknown.binds, unknown.loading, unknown.length) == (None, None, first.step)


def test_a_run_at_the_peak_rates_of_a_gpu(run):
    plan, _ = run
    train = TrainSpec(epochs=10, batch=10)
    seconds = [forecast_run(plan, train, samples=105, evaluated=20, rates=PeakRates(DEVICES[n])).run.seconds for n in ("L4", "H200")]
    assert seconds[0] > seconds[1] > 0
