"""The search for a speed-up: what it proposes is quick enough by the forecast of a run, and starts."""

import json
import math
from dataclasses import replace

import pytest

from graphopt.cli import main
from graphopt.compiler.triggers import Steps, rising_steps
from graphopt.cost.devices import DEVICES
from graphopt.cost.rates import Rates
from graphopt.cost.roofline import PeakRates
from graphopt.diff.render.run import read_run
from graphopt.errors import SpecError
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.planning.budget import in_order
from graphopt.planning.loading import LoaderRate
from graphopt.planning.quicker import Quicker
from graphopt.planning.run_cost import forecast_run
from graphopt.planning.speed import SpeedSearch
from graphopt.spec import load, loads
from graphopt.train import train

SPEC = """
[backbone]
source = "cifar"
name = "resnet8"
input = [1, 8, 8]
arguments = {{ in_chans = 1 }}

{passes}
[data]
name = "digits"
train_limit = 96
eval_limit = 32

[train]
epochs = 4
batch = 32
"""
RATES = Rates(1e-11, 1e-10, 1e-6, 0.0, "cpu")


@pytest.fixture(scope="module")
def search():
    return SpeedSearch(loads(SPEC.format(passes="")), lambda *_: RATES, hold=5.0)


@pytest.mark.parametrize("factor", [2.0])
def test_what_is_proposed_is_quick_enough_and_keeps_most(search, factor):
    found = search.suggest(search.own.seconds / factor)
    assert found.chosen.seconds <= found.limit
    assert found.spec.passes == found.chosen.added
    assert found.spec.train.epochs == found.chosen.epochs
    fitting = [trial for trial in found.tried if trial.refused is None and trial.seconds <= found.limit]
    assert found.chosen.price == min(trial.price for trial in fitting)
    assert SpeedSearch(found.spec, lambda *_: RATES).own.seconds == pytest.approx(found.chosen.seconds)


def test_fewer_epochs_are_a_way_too_and_the_passes_follow(search):
    search.suggest(search.own.seconds / 2)
    shorter = [trial for trial in search._tried.values() if trial.epochs < 4 and trial.refused is None]
    assert any(not trial.added for trial in shorter)
    for trial in shorter:
        assert trial.name.startswith(f"{trial.epochs} epochs")
        assert trial.images == trial.epochs / 4
        assert trial.updates <= trial.images
        assert all(moment < trial.epochs for value in trial.added for moment in value.when.moments(("stem",), trial.epochs))


def test_what_is_remembered_of_steps_gives_the_same_runs(search):
    search.suggest(search.own.seconds / 2)
    for trial in [trial for trial in search._tried.values() if trial.refused is None][::5]:
        passes = in_order(search.plan.passes, trial.added)
        phases = search._phases(passes, trial.epochs)
        train = search.spec.train.model_copy(update={"epochs": trial.epochs, **trial.settings})
        anew = forecast_run(phases[0].plan, train, samples=search.samples, evaluated=search.evaluated, phases=phases, rates=RATES)
        assert anew.run.seconds == trial.seconds


def _by_settings(_, train):
    """Rates of a machine on which another memory format is quicker by a third, and 16-bit arithmetic by half."""
    factor = (2 / 3 if train.channels_last else 1.0) * (0.5 if train.amp else 1.0)
    return replace(RATES, flop=factor * RATES.flop, byte=factor * RATES.byte, kernel=factor * RATES.kernel)


@pytest.mark.parametrize(
    ("extra", "keep", "factor", "settings"),
    [
        ("", False, 1.4, {"channels_last": True}),
        ("", False, 1.6, {"channels_last": True, "amp": "bfloat16"}),
        ("", True, 1.4, {}),
        ("channels_last = false", False, 1.4, {"amp": "bfloat16"}),
        ('amp = "float16"', False, 1.4, {"channels_last": True}),
        ("channels_last = false\namp = 'bfloat16'", False, 1.4, {}),
    ],
)
def test_settings_that_leave_training_as_it_is_come_first(extra, keep, factor, settings, monkeypatch):
    monkeypatch.setattr(SpeedSearch, "ladders", lambda _: iter(()))  # fewer epochs are left
    search = SpeedSearch(loads(SPEC.format(passes="") + extra), _by_settings, keep_settings=keep)
    found = search.suggest(search.own.seconds / factor)
    assert found.chosen.settings == settings
    assert not settings or (found.chosen.added, found.chosen.epochs, found.chosen.price) == ((), 4, 0.0)
    assert {key: getattr(found.spec.train, key) for key in settings} == settings
    assert found.snippet.startswith("[train]\n")


def test_what_settings_alone_cannot_do_passes_do_with_the_quickest_of_them():
    search = SpeedSearch(loads(SPEC.format(passes="")), _by_settings)
    found = search.suggest(search.own.seconds / 6)
    assert SpeedSearch(found.spec, _by_settings).own.seconds == pytest.approx(found.chosen.seconds)
    assert found.chosen.settings == {"channels_last": True, "amp": "bfloat16"}
    assert found.chosen.added or found.chosen.epochs < 4
    assert found.chosen.title.startswith('channels_last = true, amp = "bfloat16"; ')


def test_on_a_gpu_that_is_not_here_no_memory_format_is_proposed(monkeypatch):
    monkeypatch.setattr(SpeedSearch, "ladders", lambda _: iter(()))
    search = SpeedSearch(loads(SPEC.format(passes="")), lambda *_: PeakRates(DEVICES["A100"]))
    assert {key for trial in search.suggest(search.own.seconds / 1.01).tried for key in trial.settings} <= {"amp"}


def _freezing(search, when):
    value = Freeze.model_validate({"select": ["conv1", "bn1", "layer1"], "when": when})
    return search._trial(Quicker(json.dumps(when), search.own.epochs, (value,)))


def test_what_stops_while_the_learning_rate_is_low_costs_little(search):
    early, late = (_freezing(search, {"epoch": epoch}) for epoch in (1, 3))
    rate = [(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    share = (1 - early.updates) / (1 - late.updates)
    assert share == pytest.approx(sum(rate[10:]) / sum(rate[30:]), rel=0.05)
    assert early.price > 10 * late.price


def test_cached_features_are_no_images_drawn_anew():
    augmented = SPEC.format(passes="").replace("[train]", "[data.augment]\nhflip = 0.5\n[train]")
    value = Drop.model_validate({"when": {"epoch": 2, "upto": "layer1"}, "refresh": 4})
    seen = [
        SpeedSearch(loads(text), lambda *_: RATES)._trial(Quicker("drop", 4, (value,))).images
        for text in (augmented, SPEC.format(passes=""))
    ]
    assert seen == [pytest.approx((2 + 2 / 4) / 4), 1.0]


def test_fewer_epochs_are_found_where_time_is_not_in_proportion(monkeypatch):
    monkeypatch.setattr(SpeedSearch, "ladders", lambda _: iter(()))
    search = SpeedSearch(loads(SPEC.format(passes="") + "eval_every = 4"), lambda *_: RATES, keep_settings=True)
    assert search.suggest(search.own.seconds / 2).chosen.epochs == 1, "two epochs have an evaluation, too, as four have"


def test_loading_takes_its_time(search):
    slow = SpeedSearch(loads(SPEC.format(passes="")), lambda *_: RATES, loader=LoaderRate(96.0, 0))
    assert slow.own.seconds == pytest.approx(search.own.seconds + 4)
    hidden = SpeedSearch(loads(SPEC.format(passes="")), lambda *_: RATES, loader=LoaderRate(1e9, 2))
    assert hidden.own.seconds == pytest.approx(search.own.seconds)


def test_a_spec_that_is_quick_enough_gets_nothing(search):
    found = search.suggest(search.own.seconds)
    assert found.chosen is search.own
    assert found.spec.passes == ()


def test_more_than_all_passes_together_can_do_is_refused(search):
    assert search.suggest(search.own.seconds / 500).chosen is None


def test_the_command_writes_a_spec_that_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("graphopt.cli.timing.rates_for", lambda *_: RATES)
    (tmp_path / "spec.toml").write_text(SPEC.format(passes=""))
    assert main(["fit", str(tmp_path / "spec.toml"), "--speedup", "1.5", "--json", "-o", str(tmp_path / "fast.toml")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["chosen"] != "the spec as it is"
    train(load(tmp_path / "fast.toml"), tmp_path / "run")
    chosen = next(trial for trial in answer["tried"] if trial["name"] == answer["chosen"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == chosen["epochs"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--speedup", "1"], "a speed-up is a factor above 1"),
        (["--time", "soon"], 'expected a time such as "30 min"'),
        (["--speedup", "2", "--suggest"], "--suggest: a search for time has no use for it"),
        (["--speedup", "2", "--time", "1 h"], "--time: a search for time has no use for it"),
        (["--speedup", "2", "--allowance", "1.4"], "--allowance: a search for time"),
        (["--memory", "1 GiB", "--hold", "1"], "--hold: it belongs to a search for time"),
        (["--memory", "1 GiB", "--keep-settings"], "--keep-settings: it belongs to a search for time"),
    ],
)
def test_bad_options_are_one_clear_error(options, says, tmp_path, capsys):
    (tmp_path / "spec.toml").write_text(SPEC.format(passes=""))
    assert main(["fit", str(tmp_path / "spec.toml"), *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("epochs", [2, 3, 7, 100])
def test_schedules_rise_and_end_within_the_run(epochs):
    names = [f"block{i}" for i in range(9)]
    found = list(rising_steps(names, epochs))
    assert found
    for schedule in found:
        schedule.check(tuple(names))
        assert all(0 < step.epoch < epochs for step in schedule.steps)


HELD = """
[[pass]]
use = "freeze"
select = ["conv1", "bn1", "layer1"]
when = {{ epoch = 1, hold = {hold} }}
"""


def _accuracies(values, sizes=""):
    """History of evaluations, as triggers read it."""
    from graphopt.train.state import EpochRecord, History

    return History([EpochRecord(number, {"accuracy": value}, {}, sizes[number : number + 1]) for number, value in enumerate(values)])


@pytest.mark.parametrize(
    ("accuracies", "undone"),
    [
        ([0.5, 0.6], False),
        ([0.6, 0.55], True),
        ([0.6, 0.585], False),
        ([0.6, 0.7, 0.65], True),
        ([0.6, 0.5, 0.9], True),
        ([0.6, 0.595, 0.587], True),
        ([0.6, 0.595, 0.592], False),
        ([0.6, 0.585, 0.59], False),
        ([0.5, 0.6, 0.585], False),
    ],
)
def test_a_pass_is_undone_once_it_costs_too_much_or_is_about_to_and_stays_so(accuracies, undone):
    steps = Steps.model_validate({"steps": ({"epoch": 1, "upto": "a"},), "hold": 2.0})
    history = _accuracies(accuracies)
    fired = steps.decide(("a", "b"), ("a",), len(accuracies), 9, history, since=1)
    assert fired == ([("undo", None)] if undone else [])
    assert steps.decide(("a", "b"), (), len(accuracies) + 1, 9, history, since=1) == ([] if undone else [("apply", ("a",))])


@pytest.mark.parametrize(
    ("accuracies", "since", "fell"),
    [
        ([0.5, 0.6, 0.57, 0.61, 0.575], 4, False),
        ([0.5, 0.6, 0.57, 0.61, 0.555], 4, True),
        ([0.6, 0.5, 0.61, 0.62, 0.63, 0.64, 0.65, 0.62], 7, True),
        ([0.5, 0.6, 0.57, 0.61, 0.575], 1, True),
        ([0.5, 0.4, 0.6, 0.57, 0.5, 0.55], 0, False),
        ([0.6, 0.55, 0.6, 0.57, 0.6, 0.5], 0, True),
    ],
)
def test_a_fall_that_is_usual_without_the_pass_is_none(accuracies, since, fell):
    assert _accuracies(accuracies).fell(0.02, since) is fell


@pytest.mark.parametrize(("accuracies", "sizes", "fell"), [([0.8, 0.6], "ab", False), ([0.8, 0.6, 0.5], "abb", True)])
def test_accuracies_at_two_sizes_are_not_compared(accuracies, sizes, fell):
    assert _accuracies(accuracies, sizes).fell(0.02, 1) is fell


def test_a_run_thaws_what_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr("graphopt.train.state.History.fell", lambda self, by, since: len(self.records) > 2)
    spec = loads(SPEC.format(passes=HELD.format(hold=0.5)))
    train(spec, tmp_path / "run")
    decisions = read_run(tmp_path / "run").decisions
    assert [(d.epoch, d.action) for d in decisions] == [(1, "apply"), (3, "undo")]


@pytest.mark.parametrize("when", ["{ hold = 1.0 }", '{ schedule = "freezeout", hold = 1.0 }', "{ epoch = 1, hold = 0.0 }"])
def test_a_bound_that_could_not_be_held_is_refused(when):
    with pytest.raises(SpecError, match="hold"):
        loads(SPEC.format(passes=f'[[pass]]\nuse = "freeze"\nselect = ["layer1"]\nwhen = {when}'))
