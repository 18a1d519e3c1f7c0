"""Cached features on several ranks: each owns a part, and training is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt import RunError
from graphopt.data.loader import ImageFeed, open_data
from graphopt.passes.drop import Drop
from graphopt.spec import AugmentSpec, DataSpec, TrainSpec
from graphopt.train import Stopped, train
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.feature_cache import cache as cache_module
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.feature_cache.prefix import FeatureFeed, Prefix
from graphopt.train.feature_cache.store import CacheDirectory, MemoryFill
from graphopt.train.ledger import check_ledger
from graphopt.train.phase import Phase
from graphopt.train.ranks import ALONE, Ranks
from graphopt.train.run import Run
from graphopt.train.strategy import Strategy
from tests.support.backbones import Small
from tests.support.ranks import run_ranks

#: 82 samples: ranks own unequal parts
DATA = DataSpec(name="digits", train_limit=82, eval_limit=20)
TRAIN = TrainSpec(epochs=4, batch=12, device="cpu", optimizer={"name": "sgd", "lr": 0.02}, checkpoint_steps=2, ledger=True)


def _plan(**options):
    torch.manual_seed(0)
    options = {"when": [{"epoch": 1, "upto": "blocks.0"}, {"epoch": 2, "upto": "blocks.2"}], "force": True, **options}
    model = Small(drop=0.0)
    for module in model.modules():  # statistics of a batch would be each rank's own
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.track_running_stats = 0.0, True
            module.train = lambda mode=True, module=module: torch.nn.Module.train(module, False)
    model.eval()
    made = graphopt.compile(model, [Drop(**options)], input=(3, 8, 8), verify="off", costs=False)
    return replace(made, measure=None)  # a run of it records no forecasts


def _train(rank: int, folder: str, options: dict, stop_at: int = -1) -> None:
    """A run, or its rest; with `stop_at` its last rank gets a signal when it has computed so many chunks."""
    torch.set_num_threads(1)
    compute, signals = Prefix.compute, []
    begin = Run.run
    left = [stop_at]

    def computing(prefix, inputs):
        left[0] -= 1
        if left[0] == 0 and rank == torch.distributed.get_world_size() - 1:
            signals[0].signum = signal.SIGTERM
        return compute(prefix, inputs)

    def running(run):
        signals.append(run.signals)
        return begin(run)

    Prefix.compute, Run.run = computing, running
    try:
        train(_plan(**options), folder, settings=TRAIN, data=DATA, resume=True)
        assert stop_at < 0
    except Stopped:
        assert stop_at > 0
    finally:
        Prefix.compute, Run.run = compute, begin


def _weights(folder: Path):
    return load_checkpoint(folder / "last.pt")["phase"]["model"]


def _features(folder: Path) -> list[dict]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "features"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    train(_plan(), folder, settings=TRAIN, data=DATA)
    return folder


def _near(folder: Path, single: Path) -> bool:
    found, expected = _weights(folder), _weights(single)
    return all(torch.allclose(found[name].double(), expected[name].double(), atol=2e-5) for name in expected)


def test_a_stop_while_filling_and_another_number_of_ranks(tmp_path, single):
    folder = tmp_path / "run"
    options = {"cache": "disk", "folder": str(tmp_path / "kept")}
    run_ranks(_train, str(folder), options, 7, ranks=2)
    assert load_checkpoint(folder / "last.pt")["progress"]["epoch"] == 1
    run_ranks(_train, str(folder), options, ranks=3)
    assert _near(folder, single)
    last = _features(folder)
    assert [(r["cut"], r["kept"], r["filled_from"]) for r in last] == [("blocks.0", True, "images"), ("blocks.2", True, "features")]
    assert [r["bytes"] for r in last] == [r["bytes"] for r in _features(single)]
    assert all(epoch.right for epoch in check_ledger(folder / "ledger.bin", 24))


def _feeds(rank: int, folder: str, views: int) -> None:
    """The batches of features are those that the prefix makes of the batches of images; then decisions that one rank makes alone."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    ranks = Ranks.join(60).connected(torch.device("cpu"))
    plan = _plan(when="start", upto="blocks.0", views=views, dtype="bfloat16")
    plan = plan.advance_to(plan.due(0, None, 1)) if not plan.decisions and plan.needs.features is None else plan
    images = ImageFeed(open_data(DATA, (3, 8, 8), 0).train, 12, rank=ranks)
    strategy = Strategy(torch.device("cpu"), ranks=ranks)

    def cache_of(**more) -> FeatureCache:
        return FeatureCache(images, strategy, folder=Path(folder) / f"{rank}", digest=plan.digest, identity={})

    feed, _, record = cache_of().prepare(plan, {})
    assert isinstance(feed, FeatureFeed)
    assert record["kept"]
    for epoch in range(2):
        for ours, theirs in zip(feed.batches(epoch, 1), images.batches(epoch, 1), strict=True):
            assert torch.equal(ours.sample, theirs.sample)
            assert torch.equal(ours.target, theirs.target)
            assert torch.allclose(ours.input.float(), plan.prefix(theirs.input), atol=0.05, rtol=0.01)

    write = MemoryFill.write

    def refused(fill, number, *more):
        if rank == 1 and number == 2:
            raise OSError(28, "No space left on device")
        write(fill, number, *more)

    MemoryFill.write = refused
    try:
        cache = cache_of()
        feed, module, record = cache.prepare(plan, {})
    finally:
        MemoryFill.write = write
    assert (feed, module, record["kept"]) == (images, plan.module, False)
    assert cache.last_decision["why"] == "no space left on device", "on every rank"

    # One rank reads slowly, by a clock that only its reading moves.
    clock, read = [0.0], MemoryFill.read

    def slow(fill, rows):
        clock[0] += 1.0 * (rank == 1)
        return read(fill, rows)

    plan.needs.features.options["force"] = False
    MemoryFill.read, cache_module.perf_counter = slow, lambda: clock[0]
    try:
        cache = cache_of()
        assert not cache.prepare(plan, {})[2]["kept"]
    finally:
        MemoryFill.read, cache_module.perf_counter = read, perf_counter
    assert "computing them 0 us" in cache.last_decision["why"], "on every rank"


def _prepared(folder: Path, ranks: Ranks = ALONE) -> tuple[dict, list[Tensor]]:
    """How a cache of two views came about in a folder that all share, and the batches of two epochs."""
    torch.set_num_threads(1)
    plan = _plan(when="start", upto="blocks.0", views=2, cache="disk", folder=str(folder), force=False)
    plan = plan.advance_to(plan.due(0, None, 1))
    images = ImageFeed(open_data(DATA, (3, 8, 8), 0).train, 12, rank=ranks)
    cache = FeatureCache(images, Strategy(torch.device("cpu"), ranks=ranks), folder=folder, digest=plan.digest, identity={})
    feed, _, record = cache.prepare(plan, {"cut": plan.needs.features.node.name, "kept": True, "route": [plan.needs.features.node.name]})
    assert record["kept"]
    return cache.last_decision, [tensor for epoch in range(2) for batch in feed.batches(epoch) for tensor in (batch.input, batch.target)]


def _deal(rank: int, folder: str) -> None:
    """Deals what one process has left, which rank 1 does not see in the second folder, and has to compute."""
    ranks, compute, parts = Ranks.join(60).connected(torch.device("cpu")), Prefix.compute, CacheDirectory.parts
    for name in ("seen", "not by all"):
        images = ImageFeed(open_data(DATA, (3, 8, 8), 0).train, 12, rank=ranks)
        expected = [t for epoch in range(2) for batch in images.batches(epoch) for t in (batch.input, batch.target)]
        hidden, calls = name != "seen" and rank == 1, []
        Prefix.compute = lambda prefix, inputs, calls=calls: calls.append(1) or compute(prefix, inputs)
        CacheDirectory.parts = (lambda *_: []) if hidden else parts
        decision, found = _prepared(Path(folder, name), ranks)
        Prefix.compute, CacheDirectory.parts = compute, parts
        assert bool(calls) == hidden
        assert decision["filled_from"] == ("images" if hidden else "parts")
        assert [t.shape[0] for t in found] == [t.shape[0] for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(found[1::2], expected[1::2], strict=True)), "targets"
        torch.save(found, f"{folder}/{name}-{rank}.pt")


def test_another_number_of_ranks_deals_cached_features_again(tmp_path):
    """From one process to three, and back, bit for bit, without computing; a part that is damaged is computed again."""
    for name in ("seen", "not by all"):
        decision, alone = _prepared(tmp_path / name)
        assert decision["filled_from"] == "images"
    run_ranks(_deal, str(tmp_path), ranks=3)
    dealt, computed = ([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(3)] for name in ("seen", "not by all"))
    assert all(torch.allclose(a, b, atol=1e-5) for one, other in zip(dealt, computed, strict=True) for a, b in zip(one, other, strict=True))
    files = sorted(path.name for path in (tmp_path / "seen").glob("*.rows"))
    assert len(files) == 3, "of three ranks, and no longer of one process"
    shutil.copytree(tmp_path / "seen", tmp_path / "copy")
    decision, again = _prepared(tmp_path / "seen")
    assert decision["filled_from"] == "parts"
    assert all(torch.equal(a, b) for a, b in zip(again, alone, strict=True))
    shutil.rmtree(tmp_path / "seen")
    (tmp_path / "copy").rename(tmp_path / "seen")
    os.truncate(tmp_path / "seen" / files[1], 100)
    assert _prepared(tmp_path / "seen")[0]["filled_from"] == "images"


def _train_averaged(_rank: int, folder: str, strategy: str) -> None:
    settings = TRAIN.model_copy(update={"strategy": strategy, "epochs": 2, "ema": 0.9})
    train(_plan(when={"epoch": 1}, upto="blocks.0"), folder, settings=settings, data=DATA)


def test_averages_of_a_network_in_parts_behind_cached_features(tmp_path):
    _train_averaged(0, str(tmp_path / "single"), "single")
    run_ranks(_train_averaged, str(tmp_path / "parts"), "fsdp")
    found, expected = (load_checkpoint(tmp_path / name / "last.pt")["phase"]["ema"] for name in ("parts", "single"))
    assert all(torch.allclose(found[name].double(), expected[name].double(), atol=2e-5) for name in expected)
    assert [r["kept"] for r in _features(tmp_path / "parts")] == [True]


def _damaged(rank: int, folder: str) -> None:
    """The rank whose file is overwritten names it; no rank takes the step."""
    torch.set_num_threads(1)
    step, steps = Phase.step, []

    def stepped(phase, batches, done):
        if done == 7 and rank == 1:
            for rows in Path(folder, "kept").glob("*.rows"):
                if rows.stat().st_ino == os.fstat(phase.feed.entry.features._handle).st_ino:
                    os.truncate(rows, 100)
        steps.append(done)
        return step(phase, batches, done)

    Phase.step = stepped
    try:
        with pytest.raises(RunError) as caught:
            train(_plan(cache="disk", folder=f"{folder}/kept"), f"{folder}/run", settings=TRAIN, data=DATA)
    finally:
        Phase.step = step
    if rank == 1:
        assert "the file of features was changed" in str(caught.value)
        assert ".rows" in str(caught.value)
    assert steps[-1] < 12


def test_a_file_that_is_cut_short_under_one_rank(tmp_path):
    run_ranks(_damaged, str(tmp_path), ranks=2)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["total"] <= 10


@pytest.mark.parametrize(("ranks", "views"), [(2, 1), (3, 2)])
def test_features_and_order_are_those_of_the_images(tmp_path, ranks, views):
    run_ranks(_feeds, str(tmp_path), views, ranks=ranks)


def _crops(rank: int, folder: str) -> None:
    """Each sample's features, cropped after they were exchanged, are those of one process."""
    torch.set_num_threads(1)
    ranks = Ranks.join(60).connected(torch.device("cpu"))
    plan = _plan(when="start", upto="blocks.0", crops=True, views=2)
    opened = open_data(DATA.model_copy(update={"augment": AugmentSpec(crop="pad", hflip=0.5)}), (3, 8, 8), 0).train

    def feed_of(strategy: Strategy, images: ImageFeed, name: str) -> FeatureFeed:
        cache = FeatureCache(images, strategy, folder=Path(folder) / name, digest=plan.digest, identity={})
        return cache.prepare(plan, {})[0]

    several = feed_of(Strategy(torch.device("cpu"), ranks=ranks), ImageFeed(opened, 12, rank=ranks), f"{rank}")
    alone = feed_of(Strategy(torch.device("cpu")), ImageFeed(opened, 12), f"alone-{rank}")
    for epoch in range(2):
        expected = {int(i): features for batch in alone.batches(epoch) for i, features in zip(batch.sample, batch.input, strict=True)}
        for batch in several.batches(epoch):
            assert torch.allclose(batch.input, torch.stack([expected[int(i)] for i in batch.sample]), atol=1e-5)


def test_crops_do_not_depend_on_the_number_of_ranks(tmp_path):
    run_ranks(_crops, str(tmp_path))
