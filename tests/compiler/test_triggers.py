"""Triggers: what each decides before an epoch, given what was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.compiler import triggers
from graphopt.compiler.triggers import AtEpoch, Decision, FreezeOut, Progressive, Score, Start, Steps, Trigger, active_regions
from graphopt.errors import PassError
from graphopt.train.state import EpochRecord, History

NAMES = ("a", "b", "c", "d")
ADAPTER = pydantic.TypeAdapter(Trigger)


def history(**series: list[float]) -> History:
    length = max(map(len, series.values()))
    return History([EpochRecord(e, {}, {k: v[e] for k, v in series.items() if e < len(v)}) for e in range(length)])


def fired(trigger, epochs: int, record: History | None = None, names=NAMES) -> dict[int, tuple[str, ...]]:
    """Epoch -> regions taken, over a whole run."""
    active: tuple[str, ...] = ()
    found = {}
    for epoch in range(epochs):
        past = History(record.records[:epoch]) if record else None
        for action, regions in trigger.fire(names, active, epoch, epochs, past):
            assert action == "apply"
            found[epoch] = names if regions is None else regions
            active += found[epoch]
    return found


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("start", Start),
        ({"epoch": 3}, AtEpoch),
        ({"epoch": 3, "upto": "b"}, Steps),
        ([{"epoch": 3, "upto": "b"}, {"epoch": 5, "upto": "c"}], Steps),
        ({"score": "change", "below": 0.02, "patience": 2}, Score),
        ({"score": ["change", "continuation"], "below": [0.1, 0.5]}, Score),
        ({"score": "update", "percentile": 50.0, "thaw": 0.1}, Score),
        ({"schedule": "freezeout", "t0": 0.5}, FreezeOut),
        ({"schedule": "progressive"}, Progressive),
    ],
)
def test_spec_forms_read_and_write_back(written, kind):
    trigger = ADAPTER.validate_python(written)
    assert type(trigger) is kind
    assert ADAPTER.validate_python(ADAPTER.dump_python(trigger, mode="json")) == trigger


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ([{"epoch": 3, "upto": "b"}, {"epoch": 3, "upto": "c"}], "epochs must rise"),
        ([], "at least 1"),
        ({"score": ["change", "slope"], "below": [0.1]}, "1 thresholds for 2 scores"),
        ({"score": "changes"}, "'change', 'continuation', 'slope', 'update' or 'plasticity'"),
        ({"score": "update", "below": 0.1, "percentile": 50.0}, "one of below and percentile"),
        ({"schedule": "freezout"}, "'freezeout' or 'progressive'"),
        ({"schedule": "freezeout", "keep": 0.5}, "keep"),
        ({"epoch": 1, "until": 1}, "must come after"),
        ({"score": "change", "patience": 0}, "greater than or equal to 1"),
    ],
)
def test_nonsense_is_an_error(written, says):
    with pytest.raises(pydantic.ValidationError, match=says):
        ADAPTER.validate_python(written)


def test_schedule_takes_every_region_up_to_each_step():
    trigger = ADAPTER.validate_python([{"epoch": 2, "upto": "b"}, {"epoch": 4, "upto": "c"}])
    assert trigger.foreseeable
    assert fired(trigger, 6) == {2: ("a", "b"), 4: ("c",)}


def test_schedule_that_names_no_region_shows_the_nearest():
    trigger = ADAPTER.validate_python({"epoch": 2, "upto": "layer3"})
    with pytest.raises(PassError, match="layer2"):
        trigger.check(("layer1", "layer2"))


def test_schedule_must_not_go_back():
    trigger = ADAPTER.validate_python([{"epoch": 2, "upto": "c"}, {"epoch": 4, "upto": "b"}])
    with pytest.raises(PassError, match="goes back"):
        trigger.check(NAMES)


def test_score_waits_for_patience_and_for_all_regions_before():
    quick, slow = [0.5, 0.01, 0.01, 0.01, 0.01, 0.01], [0.5, 0.4, 0.4, 0.01, 0.01, 0.01]
    trigger = Score(score="change", below=0.02, patience=2)
    assert fired(trigger, 6, history(a=quick, b=slow, c=quick), ("a", "b", "c")) == {3: ("a",), 5: ("b", "c")}


def test_a_relapse_starts_the_patience_anew():
    series = [0.5, 0.01, 0.3, 0.01, 0.01, 0.01]
    assert fired(Score(score="change", below=0.02, patience=2), 7, history(a=series), ("a",)) == {5: ("a",)}


def test_both_scores_must_agree():
    # Continuation asks for a hundredth of the largest change: change alone would have fired at 2.
    series = [1.0, 0.05, 0.05, 0.005, 0.005]
    both = Score(score=("change", "continuation"), below=(0.1, 0.01), patience=1)
    assert fired(Score(score="change", below=0.1, patience=1), 5, history(a=series), ("a",)) == {2: ("a",)}
    assert fired(both, 5, history(a=series), ("a",)) == {4: ("a",)}


def test_warmup_and_every():
    still = [0.0] * 9
    assert fired(Score(score="change", patience=1, warmup=4), 9, history(a=still), ("a",)) == {5: ("a",)}
    assert fired(Score(score="change", patience=2, every=3), 9, history(a=still), ("a",)) == {6: ("a",)}


def test_cap_says_how_much_and_by_when():
    still = [0.0] * 10
    series = history(**dict.fromkeys(NAMES, still))
    assert fired(Score(score="change", patience=1, most=0.5), 10, series) == {1: ("a", "b")}
    assert fired(Score(score="change", patience=1, most=3), 10, series) == {1: ("a", "b", "c")}
    grown = fired(Score(score="change", patience=1, most=1.0, by=0.8), 10, series)
    assert grown == {2: ("a",), 4: ("b",), 6: ("c",), 8: ("d",)}


def test_score_needs_measurements():
    trigger = Score(score="change")
    assert not trigger.foreseeable
    assert fired(trigger, 10) == {}


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=12))
def test_scores_are_shares(series):
    assert 0 <= triggers.continuation(series, 3) <= 1
    assert triggers.slope(series, 3) >= 0
    assert triggers.change(series, 3) == series[-1]


def test_autofreeze_takes_regions_in_order_while_they_are_among_the_steadiest():
    """Scores before epoch 2: a 0.1, b 0.2, c 0.9, d 0.05. The median is 0.15: b stops, and d waits for b."""
    series = {name: [1.0, 1.0 - score, 1.0 - score] for name, score in zip(NAMES, (0.1, 0.2, 0.9, 0.05), strict=True)}
    trigger = Score(score="update", percentile=50.0, patience=1, warmup=1)
    assert fired(trigger, 3, history(**series)) == {2: ("a",)}
    assert triggers.update([1.0], 3) == math.inf
    assert triggers.update([0.5, 0.4], 3) == pytest.approx(0.2)


def test_a_rising_loss_thaws_until_it_is_back():
    changes, losses = [0.5, 0.01, 0.01, 0.0, 0.01, 0.01, 0.01, 0.01], [2.0, 1.0, 1.0, 1.2, 1.3, 1.05, 1.0, 0.9]
    records = [EpochRecord(e, {"loss": loss}, {"a": change}) for e, (change, loss) in enumerate(zip(changes, losses, strict=True))]
    trigger, active, found = Score(score="change", below=0.02, patience=2, thaw=0.1), (), {}
    for epoch in range(9):
        for action, regions in trigger.decide(("a",), active, epoch, 9, History(records[:epoch]), None):
            active = ("a",) if action == "apply" else ()
            found[epoch] = action, regions
    # Frozen before 3, undone before 4 at 1.2; at 1.3 nothing is left to undo; the zero of epoch 3 does not count as converged.
    assert found == {3: ("apply", ("a",)), 4: ("undo", None), 6: ("apply", ("a",))}


def test_a_rising_loss_undoes_what_an_epoch_applied_until_it_is_back():
    records = [EpochRecord(e, {"loss": loss}, {}) for e, loss in enumerate([1.0, 1.2, 1.0])]
    trigger = AtEpoch(epoch=1, thaw=0.1)
    assert trigger.decide(("a",), ("a",), 2, 9, History(records[:2]), 1) == [("undo", None)]
    assert trigger.decide(("a",), (), 3, 9, History(records), 1) == [("apply", None)]
    larger = [*records, EpochRecord(3, {"loss": 1.5}, {}, "(3, 32, 32)")]
    assert trigger.decide(("a",), ("a",), 4, 9, History(larger), 1) == []


def test_slope_of_a_straight_line():
    assert triggers.slope([1.0, 0.8, 0.6, 0.4], 3) == pytest.approx(0.2)
    assert triggers.slope([1.0, 0.5], 3) == math.inf
    assert triggers.slope([0.0, 0.0, 0.0], 3) == 0.0


@pytest.mark.parametrize(
    ("how", "t0", "expected"),
    [
        ("linear", 0.5, [0.5, 0.625, 0.75, 0.875]),
        # arXiv 1706.04983, section 3: the cubed times are the cubes of the linear ones.
        ("cubic", 0.8, [0.8**3, 0.85**3, 0.9**3, 0.95**3]),
    ],
)
def test_freezeout_times(how, t0, expected):
    trigger = FreezeOut(schedule="freezeout", t0=t0, how=how)
    assert [trigger.end(i, 4) for i in range(4)] == pytest.approx(expected)
    taken = fired(trigger, 1000)
    assert taken == {math.ceil(t * 1000 - 1e-6): (n,) for t, n in zip(expected, NAMES, strict=True)}


def test_progressive_layer_dropping_follows_theta():
    trigger = Progressive(schedule="progressive", keep=0.5, gamma=5.0)
    assert trigger.theta(0.0) == 1.0
    assert trigger.theta(1.0) == pytest.approx(0.5, abs=0.01)
    names = tuple(f"block{i}" for i in range(1, 13))
    active: tuple[str, ...] = ()
    probability = {n: 0.5 * i / 12 for i, n in enumerate(names, 1)}
    for epoch in range(200):
        for _, regions in trigger.fire(names, active, epoch, 200, None):
            active += regions
        expected = (1 - trigger.theta(epoch / 200)) * 13 / 2
        skipped = sum(probability[n] for n in active)
        # Never more than the schedule's, and never a whole region less.
        assert expected - 0.5 <= skipped <= expected + 1e-6
    assert set(active) >= set(names[1:])


def test_decisions_add_up():
    decisions = (Decision(index=1, epoch=2, regions=("a", "b")), Decision(index=0, epoch=3), Decision(index=1, epoch=4, regions=("c",)))
    assert active_regions(NAMES, Score(score="change"), 1, decisions) == ("a", "b", "c")


def test_plasticity_is_the_slope_of_how_far_outputs_move_over_the_steepest():
    assert triggers.plasticity([1.0, 0.5], 3) == math.inf
    assert triggers.plasticity([math.inf, 1.0, 0.5, 0.4], 3) == 1.0
    assert triggers.plasticity([math.inf, 1.0, 0.5, 0.4, 0.4], 3) == pytest.approx(0.05 / 0.3)
    assert triggers.plasticity([1.0, 0.5, 0.4, math.inf, 0.4], 3) == math.inf
    assert triggers.plasticity([0.0, 0.0, 0.0], 3) == 0.0


def test_egeria_reads_outputs_and_not_weights():
    moved = [math.inf, 1.0, 0.5, 0.4, 0.4, 0.4, 0.4]
    records = [EpochRecord(e, {}, {"a": 1.0}, plasticity={"a": value}) for e, value in enumerate(moved)]
    assert fired(Score(score="plasticity", patience=2), 7, History(records), ("a",)) == {6: ("a",)}
    shorter = [replace(record, plasticity={} if record.epoch < 3 else record.plasticity) for record in records]
    both = Score(score=["change", "plasticity"], below=[2.0, 1.1], patience=1)
    assert fired(both, 7, History(shorter), ("a",)) == {}, "what was not compared for so long cannot have converged"
    assert Score(score=["plasticity"]).compares_outputs
    assert not Score(score="change").compares_outputs
