"""Cached features: complete, up to date, and nothing lost where they cannot be cached."""

from __future__ import annotations

import errno
import os
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import RunError
from graphopt.passes.drop import Drop
from graphopt.spec import AugmentSpec
from graphopt.train.feature_cache import store as feature_store
from graphopt.train.feature_cache.cache import view_of
from graphopt.train.feature_cache.prefix import FeatureFeed, Prefix
from graphopt.train.feature_cache.store import MemoryFill
from graphopt.train.phase import Phase
from tests.support.backbones import Small
from tests.train.features import DATA, cache_of, equal, features_of, plan_of, run, weights


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run without a cache: its prefix runs in every step, without gradients."""
    return weights(run(tmp_path_factory.mktemp("reference"), cache="none"))


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """The weights of an undisturbed run with these options."""
    return lru_cache(lambda **options: weights(run(tmp_path_factory.mktemp("whole"), **options)))


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_cached_features_train_what_a_running_prefix_trains(tmp_path, reference, cache):
    folder = run(tmp_path, cache=cache, folder=str(tmp_path / "kept") if cache == "disk" else None)
    assert equal(weights(folder), reference)
    records = features_of(folder)
    assert [(r["cut"], r["kept"], r["filled_from"]) for r in records] == [("blocks.0", True, "images"), ("blocks.2", True, "features")]
    assert records[0]["bytes"] == 80 * 8 * 8 * 8 * 4
    if cache == "disk":
        kinds = sorted(p.suffix for p in (tmp_path / "kept").iterdir())
        assert kinds == [".json", ".json", ".rows", ".targets"], "one whole entry and the manifest; earlier ones are gone"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes_for_a_little_precision(tmp_path, reference, dtype):
    folder = run(tmp_path, dtype=dtype)
    assert features_of(folder)[0]["bytes"] == 80 * 8 * 8 * 8 * 2
    found = weights(folder)
    assert not equal(found, reference)
    assert all((found[k].double() - reference[k].double()).abs().max() < 0.1 for k in found)


class _Stop:
    """Asks a run to stop after its n-th step or so, as SIGTERM would."""

    def __init__(self, monkeypatch, after: int) -> None:
        from graphopt.train.signals import StopSignals

        self.left, self.signals = after, None
        stop, step, enter = self, Phase.step, StopSignals.__enter__

        def entered(signals):
            stop.signals = signals
            return enter(signals)

        def stepped(phase, *args):
            stop.left -= 1
            if stop.left == 0:
                stop.signals.signum = 15
            return step(phase, *args)

        monkeypatch.setattr(StopSignals, "__enter__", entered)
        monkeypatch.setattr(Phase, "step", stepped)


@pytest.mark.parametrize(
    ("cache", "step"),
    [("disk", 3), ("ram", 7), ("disk", 10), ("disk", 17), ("ram", 17), ("ram", 23)],
    ids=["before", "in the first, in memory", "at an epoch's end", "in the second", "in the second, in memory", "at the end"],
)
def test_resumed_at_any_point_the_weights_are_the_same(tmp_path, whole_of, monkeypatch, cache, step):
    whole = whole_of(cache=cache, dtype="float16")
    with monkeypatch.context() as patch:
        _Stop(patch, step)
        with pytest.raises(RunError, match="stopped"):
            run(tmp_path, cache=cache, dtype="float16")
    assert equal(weights(run(tmp_path, resume=True, cache=cache, dtype="float16")), whole)


def test_a_stop_while_filling_goes_on_from_there(tmp_path, whole_of, monkeypatch):
    whole = whole_of(cache="disk")
    written = []
    original = feature_store.FileFill.write

    def counted(fill, number, features, targets):
        original(fill, number, features, targets)
        written.append(number)

    monkeypatch.setattr(feature_store.FileFill, "write", counted)
    compute = Prefix.compute

    with monkeypatch.context() as patch:

        def stopping(prefix, inputs):
            if len(written) == 2:
                raise KeyboardInterrupt
            return compute(prefix, inputs)

        patch.setattr(Prefix, "compute", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, cache="disk")
    assert written == [0, 1]
    assert equal(weights(run(tmp_path, resume=True, cache="disk")), whole)
    assert written[2:5] == [2, 3, 4], "the first two chunks were on disk"


@pytest.mark.parametrize("how", ["bit", "short", "header", "targets"])
def test_a_damaged_entry_is_built_anew(tmp_path, whole_of, monkeypatch, how):
    whole = whole_of(cache="disk")
    with monkeypatch.context() as patch:
        _Stop(patch, 7)
        with pytest.raises(RunError, match="stopped"):
            run(tmp_path, cache="disk")
    features = tmp_path / "run" / "features"
    (rows,) = features.glob("*.rows")
    damaged = bytearray(rows.read_bytes())
    if how == "bit":
        damaged[1234] ^= 1
        rows.write_bytes(damaged)
    elif how == "short":
        rows.write_bytes(damaged[:-8])
    elif how == "header":
        rows.with_suffix(".json").write_text('{"graphopt": 1, "sums": [')
    else:
        targets = rows.with_suffix(".targets")
        targets.write_bytes(bytes([7]) + targets.read_bytes()[1:])
    assert equal(weights(run(tmp_path, resume=True, cache="disk")), whole)
    assert "fill_seconds" in features_of(tmp_path / "run")[1]


def test_other_weights_have_another_key(tmp_path):
    """A stale entry is not even looked at: its name is another."""
    keys = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        passes = [Drop(upto="blocks.0", cache="disk", force=True)]
        plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 8, 8), verify="off", costs=False)
        cache_of(tmp_path / str(seed), plan).prepare(plan, {})
        keys += [p.stem for p in (tmp_path / str(seed)).glob("*.rows")]
    assert len(set(keys)) == 2


@pytest.mark.parametrize("call", ["reserve", "_write"])
def test_a_full_disk_loses_nothing(tmp_path, reference, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_store, call, full)
    folder = run(tmp_path, cache="disk", folder=str(tmp_path / "kept"))
    assert equal(weights(folder), reference)
    assert [(t["kept"], t["why"]) for t in features_of(folder)] == [(False, "no space left on device")] * 2
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["features.json"], "nothing half-written stays"


def test_a_finished_run_leaves_no_features_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _Stop(patch, 7)
        with pytest.raises(RunError, match="stopped"):
            run(tmp_path, cache="disk")
    assert list((tmp_path / "run" / "features").glob("*.rows"))
    assert not (run(tmp_path, cache="disk", resume=True) / "features").exists()


def test_over_the_limit_the_prefix_runs(tmp_path, reference):
    # Enough for one batch, not for all; at the second cut the same.
    folder = run(tmp_path, limit="128 KiB")
    assert equal(weights(folder), reference)
    assert ["limit is 128 KiB" in t["why"] for t in features_of(folder)] == [True, True]


def test_too_little_memory_is_no_crash(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(feature_store, "available_memory", lambda: 1000)
    folder = run(tmp_path)
    assert equal(weights(folder), reference)
    assert [t["why"] for t in features_of(folder)] == ["not enough memory"] * 2


class _Clock:
    """Time that only reading takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("force", "kept"), [(False, False), (True, True)])
def test_a_cache_that_reads_slower_is_declined(tmp_path, monkeypatch, force, kept):
    plan = graphopt.compile(Small(), [Drop(upto="blocks.0", force=force)], input=(3, 8, 8), verify="off", costs=False)
    clock = _Clock()
    read = MemoryFill.read

    def slow(fill, rows):
        clock.now += 1.0
        return read(fill, rows)

    monkeypatch.setattr(MemoryFill, "read", slow)
    messages = []
    monkeypatch.setattr("graphopt.train.feature_cache.cache.perf_counter", clock)
    cache = cache_of(tmp_path, plan)
    cache.on_message = messages.append
    feed, module, record = cache.prepare(plan, {})
    assert record["kept"] is kept
    assert (module is plan.module) is not kept
    assert (feed is cache.images) is not kept
    assert kept or "force = true" in messages[0]
    # What was decided once stands when the run is resumed, whatever the clock says then.
    assert cache_of(tmp_path, plan).prepare(plan, record)[2]["kept"] is kept


def test_every_sample_once_per_epoch_in_the_images_order(tmp_path):
    plan = plan_of(when="start", upto="blocks.0", force=True)
    cache = cache_of(tmp_path, plan)
    feed, _, _ = cache.prepare(plan, {})
    assert isinstance(feed, FeatureFeed)
    assert len(feed) == len(cache.images)
    for epoch in (0, 1):
        for ours, theirs in zip(feed.batches(epoch), cache.images.batches(epoch), strict=True):
            assert torch.equal(ours.sample, theirs.sample)
            assert torch.equal(ours.target, theirs.target)
            assert torch.equal(ours.input, plan.prefix(theirs.input))
    late = list(feed.batches(1, start=3))
    assert torch.equal(late[0].sample, list(feed.batches(1))[3].sample)


# -- what may be cached ----------------------------------------------------------------------------------------------------------
AUGMENTED = DATA.model_copy(update={"augment": AugmentSpec(crop="pad", hflip=0.5)})


def test_random_augmentation_is_refused_on_disk_before_the_first_step(tmp_path):
    with pytest.raises(RunError, match=r"Cache them in RAM.*views = 4"):
        run(tmp_path, data=AUGMENTED, cache="disk")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_by_default_a_part_of_the_features_is_computed_anew_in_each_epoch(tmp_path):
    found = run(tmp_path, "default", data=AUGMENTED)
    assert equal(weights(found), weights(run(tmp_path, "four", data=AUGMENTED, refresh=4)))
    assert not equal(weights(found), weights(run(tmp_path, "fixed", data=AUGMENTED, views=1)))


def test_fixed_views_come_in_turn(tmp_path):
    plan = plan_of(when="start", upto="blocks.0", views=3)
    cache = cache_of(tmp_path, plan, AUGMENTED)
    feed, _, _ = cache.prepare(plan, {})
    seen: dict[int, list[Tensor]] = {}
    for epoch in range(6):
        for batch in feed.batches(epoch):
            for i, features in zip(batch.sample.tolist(), batch.input, strict=True):
                seen.setdefault(i, []).append(features)
    assert len(seen) == 80
    for views in seen.values():
        assert all(torch.equal(views[e], views[e + 3]) for e in range(3))
        assert len({v.sum().item() for v in views}) > 1
    view = cache.samples[(1, 5)][1]
    assert any(torch.allclose(plan.prefix(view[None])[0], f, atol=1e-6) for f in seen[5])


def test_views_are_resumed_too(tmp_path, monkeypatch):
    whole = weights(run(tmp_path, "whole", data=AUGMENTED, views=2, cache="disk"))
    with monkeypatch.context() as patch:
        _Stop(patch, 12)
        with pytest.raises(RunError, match="stopped"):
            run(tmp_path, data=AUGMENTED, views=2, cache="disk")
    assert equal(weights(run(tmp_path, data=AUGMENTED, views=2, cache="disk", resume=True)), whole)


def test_mixup_is_refused(tmp_path):
    data = DATA.model_copy(update={"augment": AugmentSpec(mixup=0.2)})
    with pytest.raises(RunError, match="mixup and CutMix"):
        run(tmp_path, data=data, views=2)


def test_a_transform_that_is_no_function_of_the_sample_is_refused(tmp_path):
    plan = plan_of(when="start", upto="blocks.0", views=2)
    cache = cache_of(tmp_path, plan)
    generator = torch.Generator()
    cache.samples.transform = lambda image: torch.rand(3, 8, 8, generator=generator)
    with pytest.raises(RunError, match="another input each time"):
        cache.check(plan)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (type("Noise", (nn.Module,), {"forward": lambda self, x: nn.functional.dropout(x, 0.5, training=True)}), "draws random numbers"),
        (type("Mix", (nn.Module,), {"forward": lambda self, x: x - x.mean(0, keepdim=True)}), "mixes the samples"),
    ],
)
def test_a_prefix_that_depends_on_more_than_its_sample_is_refused(tmp_path, layer, says):
    model = Small(drop=0.0)
    model.stem = nn.Sequential(model.stem, layer())
    plan = graphopt.compile(model, [Drop(upto="blocks.0")], input=(3, 8, 8), verify="off", costs=False)
    with pytest.raises(RunError, match=says):
        cache_of(tmp_path, plan).prepare(plan, {})


def test_values_beyond_float16_are_not_kept_as_infinity(tmp_path):
    plan = plan_of(when="start", upto="blocks.0", dtype="float16")
    plan.module.get_parameter("stem.bias").data.fill_(1e6)
    messages = []
    cache = cache_of(tmp_path, plan)
    cache.on_message = messages.append
    assert cache.prepare(plan, {})[2]["kept"] is False
    assert "beyond float16" in messages[0]


AUGMENTED = DATA.model_copy(update={"augment": AugmentSpec(crop="pad", hflip=0.5)})


def test_features_that_are_refreshed_in_every_epoch_train_what_a_running_prefix_trains(tmp_path):
    plain = run(tmp_path, "plain", data=AUGMENTED, cache="none")
    fresh = run(tmp_path, "fresh", data=AUGMENTED, refresh=1)
    assert equal(weights(plain), weights(fresh))
    assert [r["filled_from"] for r in features_of(fresh)] == ["images", "features"]
    assert features_of(fresh)[0]["bytes"] == 80 * 8 * 8 * 8 * 4, "as much as without augmentation"


@pytest.mark.parametrize("stop", [7, 12, 17])
def test_a_run_goes_on_with_the_views_that_its_features_had(tmp_path, monkeypatch, stop):
    whole = run(tmp_path, "whole", data=AUGMENTED, refresh=2)
    step = Phase.step

    def stopping(phase, batches, done):
        if done == stop:
            raise KeyboardInterrupt
        return step(phase, batches, done)

    monkeypatch.setattr(Phase, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stopped", data=AUGMENTED, refresh=2)
    monkeypatch.undo()
    assert equal(weights(run(tmp_path, "stopped", data=AUGMENTED, refresh=2, resume=True)), weights(whole))


def test_each_chunk_has_its_turn_and_keeps_its_view_until_then():
    views = [[view_of(chunk, epoch, 3) for chunk in range(4)] for epoch in range(5)]
    assert views == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [3, 1, 2, 3], [3, 4, 2, 3]]


def test_without_random_augmentation_nothing_is_computed_anew(tmp_path, reference):
    assert equal(weights(run(tmp_path, refresh=2)), reference)


@pytest.mark.parametrize("options", [{"views": 2}, {"cache": "disk"}, {"cache": "none"}])
def test_only_one_view_in_memory_can_be_refreshed(options):
    with pytest.raises(ValueError, match='refresh: only valid with cache = "ram"'):
        Drop(upto="blocks.0", refresh=2, **options)
