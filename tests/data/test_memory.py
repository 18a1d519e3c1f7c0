"""Samples that are the same in every epoch: decoded once, and the same pixels as without."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.data.loader import Batch, ImageFeed, Rank, open_data
from graphopt.spec import AugmentSpec, DataSpec
from tests.data import formats

SHAPE = (3, 24, 24)


class Counted:
    """A decoder that counts, for all processes, the images that it gets."""

    def __init__(self, decode: Any, counter: Path) -> None:
        self.decode, self.counter = decode, counter

    def __call__(self, image: Any) -> Any:
        with self.counter.open("ab") as file:
            file.write(b".")
        return self.decode(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    formats.folders(tmp_path / "images")
    return tmp_path


def opened(folder: Path, **changes: Any) -> Any:
    data = open_data(DataSpec(name="folder", root=str(folder / "images"), crop_pct=0.9, **changes), SHAPE, seed=0)
    for name in ("train", "evaluation"):
        transform = getattr(data, name).transform
        transform.decode = Counted(transform.decode, folder / name)
    return data


def decoded(folder: Path, name: str = "train") -> int:
    """How many images were decoded since the last call."""
    file = folder / name
    count = file.stat().st_size if file.exists() else 0
    file.write_bytes(b"")
    return count


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_batches_from_images_that_are_decoded_once(folder: Path, workers: int) -> None:
    plain = ImageFeed(opened(folder, cache=0).train, 6)
    expected = [list(plain.batches(epoch)) for epoch in range(3)]
    assert decoded(folder) == 3 * 12
    with closing(ImageFeed(opened(folder).train, 6, workers=workers)) as feed:
        assert all(same(list(feed.batches(epoch)), expected[epoch]) for epoch in range(3))
    assert decoded(folder) == 12


def test_samples_that_an_epoch_leaves_out_are_decoded_when_their_turn_comes(folder: Path) -> None:
    plain, feed = (ImageFeed(opened(folder, cache=cache).train, 5) for cache in (0, 2**20))
    rest = list(feed.batches(0, start=1))
    assert same(rest, list(plain.batches(0))[1:])
    decoded(folder)
    assert same(list(feed.batches(1)), [Batch(*b) for b in plain.batches(1)])
    seen = {int(i) for batch in rest for i in batch.sample}
    fresh = {int(i) for batch in feed.batches(1) for i in batch.sample} - seen
    assert decoded(folder) == 10 + len(fresh)


def test_evaluation_on_ranks_keeps_each_ranks_own(folder: Path) -> None:
    found = Counter[int]()
    for number in range(5):
        feed = ImageFeed(opened(folder).evaluation, 5, shuffle=False, rank=Rank(number, 5))
        once, again = list(feed.batches(0)), list(feed.batches(1))
        assert same(once, again)
        assert decoded(folder, "evaluation") == len({int(i) for batch in once for i in batch.sample})
        found.update(int(i) for n, batch in enumerate(once) for i in batch.sample[: feed.real(n)])
    assert found == Counter(range(12))


@pytest.mark.parametrize(
    ("changes", "train", "evaluation"),
    [
        ({"cache": 12 * 3 * 24 * 24}, False, True),
        ({"cache": 2 * 12 * 3 * 24 * 24}, True, True),
        ({"cache": 12 * 3 * 24 * 24 - 1}, False, False),
        ({"augment": AugmentSpec(hflip=0.5)}, False, True),
        ({"augment": AugmentSpec(mixup=0.5)}, True, True),
    ],
)
def test_what_is_kept_is_the_same_in_every_epoch_and_fits(folder: Path, changes: dict[str, Any], train: bool, evaluation: bool) -> None:
    data = opened(folder, **changes)
    for name, kept in (("train", train), ("evaluation", evaluation)):
        feed = ImageFeed(getattr(data, name), 6)
        for epoch in range(2):
            list(feed.batches(epoch))
        assert decoded(folder, name) == (12 if kept else 24), name


def test_a_batch_is_the_receivers_own(folder: Path) -> None:
    feed = ImageFeed(opened(folder).evaluation, 12, shuffle=False)
    (first,) = feed.batches(0)
    before = first.input.clone()
    first.input.zero_()
    assert torch.equal(next(iter(feed.batches(1))).input, before)


def test_an_image_that_is_gone_is_not_missed_once_it_is_kept(folder: Path) -> None:
    feed = ImageFeed(opened(folder).train, 12)
    before = next(iter(feed.batches(0)))
    for file in (folder / "images" / "train").glob("*/*"):
        os.remove(file)
    assert torch.equal(next(iter(feed.batches(0))).input, before.input)
