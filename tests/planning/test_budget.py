"""fit: a budget in, a batch or a spec out, by the cost model."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.cost import CostError, forecast
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.planning.budget import LARGEST_BATCH, Budget, Search, in_order, largest_batch
from graphopt.spec import dumps, loads

SPEC = """
verify = "fast"
[backbone]
source = "python"
name = "tests.support.backbones:Small"
input = [3, 16, 16]
[train]
batch = 64
epochs = 4
"""
FREEZE = '[[pass]]\nuse = "freeze"\nselect = ["stem", "blocks.0"]\nwhen = { epoch = 2 }\n'
STEP = forecast(nn.Linear(2, 2), (2,), 1)


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(0, 400), st.integers(1, 10**8))
def test_the_largest_batch_is_the_largest(fixed, slope, floor, memory):
    asked = []

    def peak(batch):
        asked.append(batch)
        return replace(STEP, batch=batch, peak_bytes=fixed + max(slope * batch, floor * slope))

    if peak(1).peak_bytes > memory:
        with pytest.raises(CostError, match="one sample takes"):
            largest_batch(peak, Budget(memory))
        return
    batch, cost = largest_batch(peak, Budget(memory))
    assert cost.batch == batch
    assert cost.peak_bytes <= memory
    assert batch == LARGEST_BATCH or peak(batch + 1).peak_bytes > memory
    assert len(asked) < 60


@pytest.fixture(scope="module")
def search():
    return Search(loads(SPEC), trust=True)


@pytest.fixture(scope="module")
def frozen():
    return Search(loads(SPEC + FREEZE), trust=True)


def test_the_batch_found_fits_and_the_next_does_not(search):
    memory = 10 * 2**20
    found = search.largest_batch(Budget(memory=memory))
    assert found.spec.train.batch == found.batch
    assert found.chosen.cost.peak_bytes <= memory < search.cost(search.plan.phases(search.spec.train.epochs), found.batch + 1).peak_bytes
    with_room = search.largest_batch(Budget(memory=memory, allowance=1.25))
    assert with_room.batch < found.batch


def test_the_batch_counts_the_gradients_of_micro_batches_before(search):
    parts = Search(loads(SPEC.replace("batch = 64", "batch = 64\naccumulate = 4")), trust=True)
    budget = Budget(memory=search.cost(search.plan.phases(1), 8).peak_bytes)
    found = parts.largest_batch(budget)
    assert search.largest_batch(budget).batch == 8
    assert found.batch == found.spec.train.batch == found.chosen.cost.batch == 4 * 7
    assert parts.backbone.flops == search.backbone.flops


def test_the_batch_must_fit_in_every_phase(frozen, search):
    # Later epochs need less; the first ones decide.
    budget = Budget(memory=10 * 2**20)
    assert frozen.largest_batch(budget).batch == search.largest_batch(budget).batch


def test_what_fits_as_it_is_needs_nothing(search, frozen):
    for own in (search, frozen):
        found = own.suggest(Budget(memory=2 * own.backbone.peak_bytes))
        assert (found.chosen.name, found.chosen.added, found.snippet) == ("the spec as it is", (), "")


def test_the_less_a_candidate_leaves_exact_the_later_it_is_chosen(search):
    words = {"checkpoint": "everything", "freeze": "gradients of what trains", "supervise": "outputs, not gradients"}
    shown = [c for c in search.front if c.cost and c.added]
    for candidate in shown:
        assert str(candidate.exact) == words[max((p.name for p in candidate.added), key=list(words).index)]
    found = search.suggest(Budget(memory=min(c.cost.peak_bytes for c in shown if str(c.exact) == "everything")))
    assert [p.name for p in found.chosen.added] == ["checkpoint"], "supervise fits with fewer FLOPs, but by other gradients"
    assert found.to_dict()["candidates"][0]["exact"] == "everything"
    pasted = loads(SPEC + found.snippet)
    assert pasted.passes == found.spec.passes


def test_a_snippet_says_where_it_belongs(frozen):
    found = frozen.suggest(Budget(memory=min(c.cost.peak_bytes for c in frozen.front if c.cost and c.exact == 1)))
    assert found.snippet.startswith('# after the spec\'s other passes\n[[pass]]\nuse = "checkpoint"\n')


def test_no_candidate_ends_in_an_internal_error(search, frozen):
    assert not [c.refused for own in (search, frozen) for c in own.front if c.refused and "internal" in c.refused]


def test_a_suggestion_fits_trains_everything_where_it_can_and_is_a_spec(search):
    budget = Budget(memory=search.backbone.peak_bytes * 7 // 10)
    found = search.suggest(budget)
    assert found.chosen.fits
    assert found.chosen.verified
    assert found.chosen.untrained == 0
    assert found.chosen.cost.peak_bytes <= budget.memory
    rivals = [c for c in found.candidates if c.fits and c.exact == found.chosen.exact]
    assert found.chosen.cost.flops == min(c.cost.flops for c in rivals)
    again = loads(dumps(found.spec))
    assert again == found.spec
    assert [p.name for p in again.passes] == [v.name for v in found.chosen.added]
    json.dumps(found.to_dict())


def test_the_front_holds_nothing_that_another_candidate_beats(search):
    shown = search.suggest(Budget(memory=1), everything=True).candidates
    front = [c for c in shown if c.best]
    assert all(c.verified for c in front)
    figures = {id(c): (c.cost.peak_bytes, c.cost.flops, c.exact, c.untrained) for c in shown if c.cost}
    for candidate in (c for c in shown if c.cost):
        mine = figures[id(candidate)]
        better = [c for c in front if figures[id(c)] != mine and all(a <= b for a, b in zip(figures[id(c)], mine, strict=True))]
        assert bool(better) != candidate.best


def test_the_choice_takes_few_forecasts_and_is_as_good_as_with_all_of_them(search):
    for share in (1.0, 0.7, 0.5):
        budget = Budget(memory=int(share * search.backbone.peak_bytes))
        few, all_of_them = search.suggest(budget), search.suggest(budget, everything=True)
        assert len(few.candidates) <= len(all_of_them.candidates) // 2
        assert [c.price for c in (few.chosen,) if c] == [c.price for c in (all_of_them.chosen,) if c]


def test_another_division_replaces_the_specs_own():
    own = '[[pass]]\nuse = "supervise"\ncuts = ["blocks.2"]\ndecoder = "none"\n'
    search = Search(loads(SPEC + own), trust=True)
    tried = next(c for c in search.front if c.name == "supervise, 3 modules")
    assert tried.refused is None
    assert tried.added[0].decoder == "none", "what else the spec asks of it stays"
    found = search.suggest(Budget(memory=tried.cost.peak_bytes))
    assert [p.name for p in found.spec.passes].count("supervise") == 1


def test_pairs_that_save_differently_are_tried(search):
    pairs = [c for c in search.front if ";" in c.name]
    assert {tuple(v.name for v in c.added) for c in pairs} == {
        ("supervise", "checkpoint"),
        ("freeze", "supervise"),
        ("freeze", "checkpoint"),
        ("freeze", "supervise", "checkpoint"),
    }
    assert all(c.cost for c in pairs if not c.refused)
    assert all(c.cost.peak_bytes < search.backbone.peak_bytes for c in pairs if c.cost)


def test_a_flops_budget_freezes_as_little_as_it_can(search):
    found = search.suggest(Budget(flops=0.75))
    assert found.chosen.cost.flops <= 0.75 * found.backbone.flops
    cheaper = [c for c in found.candidates if c.fits and c.exact <= found.chosen.exact and c.untrained < found.chosen.untrained]
    assert not cheaper


def test_nothing_fits_nothing_is_chosen(search):
    found = search.suggest(Budget(memory=1000))
    assert found.chosen is None
    assert found.spec is None


def test_the_specs_own_passes_stay(frozen):
    found = frozen.suggest(Budget(memory=frozen.backbone.peak_bytes * 7 // 10))
    assert "freeze" in [p.name for p in found.spec.passes]


@pytest.mark.parametrize("budget", [{}, {"flops": 0.0}, {"memory": 1, "allowance": 0.5}, {"memory": 1, "allowance": math.nan}])
def test_budgets_that_are_none(budget):
    with pytest.raises(CostError):
        Budget(**budget)


def test_a_batch_is_for_memory(search):
    with pytest.raises(CostError, match="do not depend"):
        search.largest_batch(Budget(flops=0.5))
    with pytest.raises(CostError, match="one sample takes"):
        search.largest_batch(Budget(memory=1000))


def test_added_passes_that_split_come_first_and_those_that_reuse_splits_last():
    freeze, other = Freeze(select=("stem",)), Freeze(select=("blocks.0",))
    split, recompute = Supervise(modules=2), Checkpoint(segments=2)
    assert in_order([freeze], [recompute, other, split]) == [split, freeze, other, recompute]
    assert in_order([Checkpoint(segments=4), freeze], [recompute]) == [freeze, recompute], "a plan has one of these at most"
