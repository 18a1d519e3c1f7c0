from __future__ import annotations

import gc
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from graphopt import RunError
from graphopt.data.loader import Batch, ImageFeed, Rank, epoch_order, open_data, stratified
from graphopt.data.mixing import Mixer
from graphopt.errors import printable
from graphopt.spec import AugmentSpec, DataSpec
from tests.data import formats

LIVELY = AugmentSpec(crop="resized", hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", erase=0.3)


def opened(shape: tuple[int, ...] = (3, 8, 8), **changes: Any):  # type: ignore[no-untyped-def]
    return open_data(DataSpec(**changes), shape, seed=0)


def feed(data: Any, batch: int = 32, **changes: Any) -> ImageFeed:
    return ImageFeed(data.train, batch, seed=0, **changes)


# -- digits -----------------------------------------------------------------------------------------------------------------
def test_digits_are_real_split_and_stratified() -> None:
    data = opened((1, 8, 8))
    assert (len(data.train), len(data.evaluation), data.classes) == (1442, 355, 10)
    images = torch.cat([b.input for b in ImageFeed(data.train, 100, shuffle=False).batches(0)])
    assert images.mean().abs() < 0.05
    assert (images.std() - 1).abs() < 0.05
    for samples in (data.train, data.evaluation):
        counts = Counter(samples.images[i][1] for i in range(len(samples)))
        assert max(counts.values()) - min(counts.values()) <= len(samples) * 0.02
    seen = {image.tobytes() for image, _ in (data.train.images[i] for i in range(len(data.train)))}
    # The set itself has a few identical drawings; beyond those nothing is in both halves.
    assert sum(data.evaluation.images[i][0].tobytes() in seen for i in range(len(data.evaluation))) <= 2


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 40, 24), (3, 224, 224)])
def test_images_come_in_the_shape_the_backbone_takes(shape: tuple[int, ...]) -> None:
    for augment in (AugmentSpec(), AugmentSpec(crop="pad", hflip=0.5), LIVELY):
        data = opened(shape, augment=augment, train_limit=4, eval_limit=4)
        for samples in (data.train, data.evaluation):
            _, image, _ = samples[(0, 1)]
            assert tuple(image.shape) == shape
            assert image.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 8), (3,), (64, 8, 8)])
def test_shapes_that_images_do_not_have(shape: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match=r"backbone\.input: images are"):
        opened(shape)


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    data = opened((3, 16, 16), crop_pct=0.875)
    data.evaluation.images, data.evaluation.chosen = data.train.images, data.train.chosen
    assert data.train.deterministic
    assert torch.equal(data.train[(0, 5)][1], data.evaluation[(3, 5)][1])


def test_the_spec_overrides_the_statistics() -> None:
    plain = opened((3, 8, 8), mean=(0.0,), std=(1.0,)).train[(0, 0)][1]
    assert 0 <= plain.min() < plain.max() <= 1
    with pytest.raises(RunError, match=r"data\.mean: 2 values for 3 channels"):
        opened((3, 8, 8), mean=(0.0, 0.0))


# -- order and chance -------------------------------------------------------------------------------------------------------
def everything(batches: Any) -> Batch:
    parts = list(batches)
    return Batch(*(torch.cat([getattr(b, name) for b in parts]) for name in Batch._fields))


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    data = opened(augment=LIVELY, train_limit=64)
    one, again = everything(feed(data).batches(1)), everything(feed(data).batches(1))
    other, reseeded = everything(feed(data).batches(2)), everything(ImageFeed(data.train, 32, seed=1).batches(1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.sample, other.sample)
    assert not torch.equal(one.sample, reseeded.sample)
    assert torch.equal(one.sample.sort().values, torch.arange(64))


def test_from_the_middle_on_it_is_the_same_epoch() -> None:
    data = opened(augment=LIVELY, train_limit=160)
    whole, rest = list(feed(data).batches(3)), list(feed(data).batches(3, start=2))
    assert len(rest) == len(whole) - 2 == 3
    assert torch.equal(rest[0].input, whole[2].input)


def test_loader_processes_change_nothing() -> None:
    data = opened(augment=LIVELY, train_limit=64)
    alone, helped = everything(feed(data).batches(0)), everything(feed(data, workers=2).batches(0))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_augmentation_varies_by_epoch_and_leaves_the_models_chance_alone() -> None:
    data = opened(augment=LIVELY, train_limit=64)
    assert not data.train.deterministic
    assert not torch.equal(data.train[(0, 3)][1], data.train[(1, 3)][1])
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(feed(data).batches(0))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def test_every_sample_is_evaluated_once_in_order() -> None:
    data = opened(eval_limit=70)
    seen = everything(ImageFeed(data.evaluation, 32, shuffle=False).batches(0))
    assert torch.equal(seen.sample, torch.arange(70))


def test_ranks_share_an_epoch_without_overlap() -> None:
    data = opened(train_limit=70)
    parts = [everything(feed(data, batch=16, rank=Rank(rank, 2)).batches(0)).sample for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 32
    assert not set(parts[0].tolist()) & set(parts[1].tolist())


def test_a_feed_that_nobody_holds_ends_its_processes_at_once() -> None:
    """Those that wait for the collector find their queues gone, and end after seconds only."""
    gc.disable()
    left = feed(opened(train_limit=40), workers=1)
    list(left.batches(0))
    workers = left._iterator._workers
    del left
    gc.enable()
    assert [worker.exitcode for worker in workers] == [0]


def test_batches_fill_whole_steps() -> None:
    data = opened(train_limit=70)
    assert len(feed(data, batch=24, accumulate=3)) == 6
    with pytest.raises(RunError, match="one training step takes 100 images, the training set has 70"):
        feed(data, batch=100, accumulate=2)


def test_limits_keep_the_classes_in_proportion() -> None:
    targets = [0] * 60 + [1] * 30 + [2] * 10
    chosen = stratified(targets, 20)
    assert Counter(targets[i] for i in chosen) == {0: 12, 1: 6, 2: 2}
    assert chosen == stratified(targets, 20) == sorted(set(chosen))
    assert set(chosen) <= set(stratified(targets, 40))
    assert stratified(targets, None) == stratified(targets, 1000) == list(range(100))


def test_the_strongest_policies_run_on_todays_pillow() -> None:
    for policy in ("rand-m10-inc1", "rand-m10", "augmix-m10", "v0", "original"):
        data = opened(augment=AugmentSpec(auto_augment=policy), train_limit=200)
        assert torch.isfinite(everything(feed(data, batch=200).batches(0)).input).all()


# -- mixup ------------------------------------------------------------------------------------------------------------------
def test_mixup_makes_soft_targets_from_epoch_and_batch() -> None:
    mixer = Mixer.of(AugmentSpec(mixup=0.5, cutmix=1.0), 10, 0.1, seed=0)
    assert mixer is not None
    batch = next(iter(feed(opened(train_limit=64)).batches(0)))
    before = batch.input.clone()
    one, again, other = mixer(batch, 0, 1), mixer(batch, 0, 1), mixer(batch, 1, 1)
    assert one.target.shape == (32, 10)
    assert torch.allclose(one.target.sum(1), torch.ones(32), atol=1e-5)
    assert torch.equal(one.input, again.input)
    assert not torch.equal(one.input, other.input)
    assert torch.equal(batch.input, before)
    with pytest.raises(RunError, match="mixup pairs images, the batch has 3"):
        mixer(Batch(batch.sample[:3], batch.input[:3], batch.target[:3]), 0, 0)


def test_no_mixup_no_mixer() -> None:
    assert Mixer.of(AugmentSpec(), 10, 0.1, seed=0) is None


# -- files ------------------------------------------------------------------------------------------------------------------
Maker = Callable[[Path, pytest.MonkeyPatch], None]
FORMATS: dict[str, tuple[Maker, int, tuple[int, int], Callable[[Any], tuple[Any, int]]]] = {
    "cifar10": (formats.cifar, 10, (100, 20), lambda root: datasets.CIFAR10(root)[3]),
    "cifar100": (lambda r, m: formats.cifar(r, m, hundred=True, count=100), 100, (100, 100), lambda root: datasets.CIFAR100(root)[3]),
    "mnist": (lambda r, m: formats.idx(r, "MNIST"), 10, (20, 20), lambda root: datasets.MNIST(root)[3]),
    "fashion_mnist": (lambda r, m: formats.idx(r, "FashionMNIST"), 10, (20, 20), lambda root: datasets.FashionMNIST(root)[3]),
    "kmnist": (lambda r, m: formats.idx(r, "KMNIST"), 10, (20, 20), lambda root: datasets.KMNIST(root)[3]),
    "stl10": (formats.stl10, 10, (20, 20), lambda root: datasets.STL10(root)[3]),
    "svhn": (formats.svhn, 10, (20, 20), lambda root: datasets.SVHN(root)[3]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_in_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, classes, sizes, reference = FORMATS[name]
    make(tmp_path, monkeypatch)
    for channels in (3, 1):
        data = opened((channels, 32, 32), name=name, root=str(tmp_path))
        assert (len(data.train), len(data.evaluation)) == sizes
        assert data.classes == classes
        assert data.train[(0, 0)][1].shape == (channels, 32, 32)
    image, target = reference(str(tmp_path))
    mine, label = data.train.images[3]
    assert (mine.tobytes(), label) == (image.tobytes(), target)
    assert min(label for _, label in (data.train.images[i] for i in range(20))) >= 0


@pytest.mark.parametrize("name", FORMATS)
def test_missing_files_are_one_error_that_says_what_belongs_where(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError) as error:
        opened((3, 32, 32), name=name, root=str(tmp_path))
    text = str(error.value)
    assert str(tmp_path) in text
    assert "It must hold" in text
    assert "never downloads" in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def test_a_damaged_pickle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.cifar(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"data_batch_2: is damaged, or no pickle of plain values"):
        opened((3, 32, 32), name="cifar10", root=str(tmp_path))


#: of an idx file: which, what happens to it, and the message
DAMAGED_IDX: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "dimensions": ("train-images-idx3", lambda b: b[:3] + b"\x13" + b[4:], "is damaged"),
    "type": ("train-labels-idx1", lambda b: b[:2] + b"\x28" + b[3:], "is damaged"),
    "count": ("t10k-images-idx3", lambda b: b[:4] + b"\x80" + b[5:], "is damaged"),
    "size": ("train-images-idx3", lambda b: b[:-1], "is damaged"),
    "header": ("train-labels-idx1", lambda b: b[:5], "is damaged"),
    "fewer": ("train-labels-idx1", lambda b: b[:7] + b"\x13" + b[8:-1], "has 19 labels, train-images-idx3-ubyte has 20 images"),
    "label": ("t10k-labels-idx1", lambda b: b[:-1] + b"\x89", "has label 137, there are 10 classes"),
}


@pytest.mark.parametrize("what", DAMAGED_IDX)
def test_a_damaged_idx_file_is_named(tmp_path: Path, what: str) -> None:
    formats.idx(tmp_path, "MNIST")
    name, damage, message = DAMAGED_IDX[what]
    file = tmp_path / "MNIST" / "raw" / f"{name}-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=message) as caught:
        opened((3, 32, 32), name="mnist", root=str(tmp_path))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("inside", ["", "imagenette2-320"])
@pytest.mark.parametrize("splits", [("train", "val"), ("train", "validation"), ("training", "test")])
def test_folders_of_images(tmp_path: Path, inside: str, splits: tuple[str, str]) -> None:
    formats.folders(tmp_path / inside, splits)
    data = opened((3, 32, 32), name="imagenette" if inside else "folder", root=str(tmp_path), crop_pct=0.875)
    assert (len(data.train), len(data.evaluation), data.classes) == (12, 12, 3)
    assert [data.train.images[i][1] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train[(0, 11)][1].shape == (3, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    formats.folders(tmp_path)
    broken = sorted((tmp_path / "train").glob("*/*"))[3]
    broken.write_bytes(broken.read_bytes()[:60] if content is None else content)
    data = opened(name="folder", root=str(tmp_path))
    with closing(feed(data, batch=4, workers=workers)) as images, pytest.raises(RunError, match="the image cannot be read") as caught:
        list(images.batches(0))
    assert str(caught.value).startswith(f"{broken}: ")
    assert "Traceback" not in str(caught.value)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no folder train or training"):
        opened((3, 32, 32), name="folder", root=str(tmp_path))
    formats.folders(tmp_path, ("train",))
    with pytest.raises(RunError, match="no folder val or validation"):
        opened((3, 32, 32), name="folder", root=str(tmp_path))
    formats.folders(tmp_path, ("val",), classes=2)
    with pytest.raises(RunError, match="train has 3 classes, validation has 2; only train has n00000002"):
        opened((3, 32, 32), name="folder", root=str(tmp_path))


def test_classes_are_compared_by_name(tmp_path: Path) -> None:
    formats.folders(tmp_path)
    (tmp_path / "val" / "n00000002").rename(tmp_path / "val" / "zebra")
    with pytest.raises(RunError, match="only train has n00000002; only validation has zebra"):
        opened((3, 32, 32), name="folder", root=str(tmp_path))


@pytest.mark.parametrize("links", [{"loop": "."}, {"up": ".."}, {"l1": ".", "l2": "."}, {"other": "../n00000001"}])
def test_links_that_lead_back_are_errors(tmp_path: Path, links: dict[str, str]) -> None:
    formats.folders(tmp_path)
    for name, target in links.items():
        (tmp_path / "train" / "n00000000" / name).symlink_to(target)
    with pytest.raises(RunError, match="is the same folder as") as caught:
        opened((3, 32, 32), name="folder", root=str(tmp_path))
    assert str(tmp_path / "train") in str(caught.value.where)


def test_links_to_folders_elsewhere_are_followed_in_torchvisions_order(tmp_path: Path) -> None:
    formats.folders(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    one = tmp_path / "train" / "n00000001"
    one.rename(tmp_path / "elsewhere" / "one")
    one.symlink_to(tmp_path / "elsewhere" / "one")
    (one / "deeper").mkdir()
    (one / "0.png").rename(one / "deeper" / "9.png")
    data = opened((3, 32, 32), name="folder", root=str(tmp_path))
    assert data.train.images.samples == datasets.ImageFolder(str(tmp_path / "train")).samples


def test_names_that_are_no_utf_8_are_read_and_shown(tmp_path: Path) -> None:
    formats.folders(tmp_path)
    folder = tmp_path / "train" / os.fsdecode(b"n\xff")
    (tmp_path / "train" / "n00000001").rename(folder)
    (tmp_path / "val" / "n00000001").rename(tmp_path / "val" / folder.name)
    damaged = folder / os.fsdecode(b"\xfe\x1b[31m.png")
    (folder / "0.png").rename(damaged)
    data = opened((3, 32, 32), name="folder", root=str(tmp_path))
    before = data.train.fingerprint()
    damaged.write_bytes(b"no image")
    assert data.train.fingerprint() != before
    with pytest.raises(RunError, match="the image cannot be read") as caught:
        [data.train[0, number] for number in range(len(data.train))]
    assert printable(str(caught.value.where)).encode().endswith(rb"n\udcff/\udcfe\u001b[31m.png")


@pytest.mark.parametrize("kind", ["pipe", "broken link", "folder"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    formats.folders(tmp_path)
    path = tmp_path / "train" / "n00000001" / "extra.png"
    if kind == "folder":
        path.mkdir()
        assert len(opened((3, 32, 32), name="folder", root=str(tmp_path)).train) == 12
        return
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("gone.png")
    with pytest.raises(RunError, match="is neither a file nor a link to one") as caught:
        opened((3, 32, 32), name="folder", root=str(tmp_path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decompression_bomb_is_named(tmp_path: Path, workers: int) -> None:
    formats.folders(tmp_path)
    bomb = sorted((tmp_path / "train").glob("*/*"))[3]
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1251 * 20_000))), (b"IEND", b""))
    packed = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + packed)
    data = opened(name="folder", root=str(tmp_path))
    with closing(feed(data, batch=4, workers=workers)) as images, pytest.raises(RunError, match="decompression bomb") as caught:
        list(images.batches(0))
    assert caught.value.where == str(bomb)


def test_names_and_roots_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no data set 'cifar-11'.*cifar10"):
        opened(name="cifar-11", root=str(tmp_path))
    with pytest.raises(RunError, match=r"data\.root: cifar10 needs a folder"):
        opened(name="cifar10")
    with pytest.raises(RunError, match="there is no folder"):
        opened(name="cifar10", root=str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="digits has no split 'test2'"):
        opened(eval_split="test2")
    assert len(opened(name="Digits").train) == 1442


@pytest.mark.parametrize("ranks", [1, 2])
def test_repeated_images_come_in_a_row_with_other_draws(ranks: int) -> None:
    """The order is that of timm's sampler, on all ranks together: each image `repeats` times, as many entries as there are images."""
    spec = DataSpec(name="digits", train_limit=20, eval_limit=10, augment=AugmentSpec(crop="resized", hflip=0.5, repeats=3))
    data = open_data(spec, (1, 8, 8), seed=0)
    feeds = [ImageFeed(data.train, 4, seed=5, rank=Rank(number, ranks)) for number in range(ranks)]
    batches = [list(feed.batches(1)) for feed in feeds]
    taken = [rank[number].sample[place].item() for number in range(5) for place in range(4 // ranks) for rank in batches]
    assert taken == [index for index in epoch_order(20, 5, 1) for _ in range(3)][:20]
    images = [image.numpy().tobytes() for rank in batches for batch in rank for image in batch.input]
    assert len({*images}) == len(images)
    assert torch.equal(next(iter(feeds[0].batches(1, start=2))).input, batches[0][2].input)


def test_images_are_not_repeated_without_other_draws() -> None:
    with pytest.raises(ValueError, match="needs random augmentation"):
        AugmentSpec(repeats=2)
