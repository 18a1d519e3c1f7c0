"""Tar shards and arrow folders: read by random access, exactly once, and what bad files get."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from graphopt import RunError
from graphopt.data import shards
from graphopt.data.loader import ImageFeed, Rank, open_data
from graphopt.spec import DataSpec
from graphopt.train import Stopped, train
from graphopt.train.ledger import check_ledger
from tests.data import formats
from tests.train import small

COUNT, PER_SHARD = 20, 5


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def images() -> list[Image.Image]:
    return [Image.fromarray(p) for p in formats.pixels(COUNT, 8, 8, 3)]


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Two splits, as webdataset's own writer makes them."""
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        with wds.ShardWriter(str(root / f"set-{split}-%04d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
            for number, image in enumerate(images()):
                writer.write({"__key__": f"{split}/{number:04d}", "png": image, "cls": number % 4, "json": {"more": 1}})
    return root


@pytest.fixture(scope="module")
def arrow(tmp_path_factory) -> Path:
    library = pytest.importorskip("datasets", reason="datasets is not installed")
    root = tmp_path_factory.mktemp("arrow") / "saved"
    features = library.Features({"img": library.Image(), "label": library.ClassLabel(names=["a", "b", "c", "d"])})
    table = {"img": images(), "label": [n % 4 for n in range(COUNT)]}
    splits = {name: library.Dataset.from_dict(table, features=features) for name in ("train", "test")}
    library.DatasetDict(splits).save_to_disk(str(root))
    return root


def _spec(name: str, root: Path, **more) -> DataSpec:
    return DataSpec(name=name, root=str(root), mean=(0.0,), std=(1.0,), **more)


@pytest.mark.parametrize("name", ["webdataset", "arrow"])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_sample_once_on_three_ranks_and_from_the_middle(request, name, workers):
    root = request.getfixturevalue("tars" if name == "webdataset" else "arrow")
    data = open_data(_spec(name, root), (3, 8, 8), 0)
    assert (len(data.train), len(data.evaluation), data.classes) == (COUNT, COUNT, 4)
    expected = [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images()]
    whole = list(ImageFeed(data.train, 6).batches(1))
    seen: list[int] = []
    for rank in range(3 if not workers else 1):
        feed = ImageFeed(data.train, 6, workers=workers, rank=Rank(rank, 3))
        late = list(feed.batches(1, 1))
        for batch, of_all in zip(late, whole[1:], strict=True):
            assert torch.equal(batch.sample, of_all.sample[rank::3])
            assert batch.target.tolist() == [int(i) % 4 for i in batch.sample]
            assert all(torch.allclose(image, expected[i], atol=1e-6) for i, image in zip(batch.sample, batch.input, strict=True))
            seen += batch.sample.tolist()
        feed.close()
    assert workers or sorted(seen) == sorted(i for batch in whole[1:] for i in batch.sample.tolist())
    assert data.train.fingerprint() == open_data(_spec(name, root), (3, 8, 8), 0).train.fingerprint()


@pytest.mark.parametrize("name", ["webdataset", "arrow"])
def test_a_run_stops_in_an_epoch_and_goes_on(request, tmp_path, name):
    root = request.getfixturevalue("tars" if name == "webdataset" else "arrow")
    settings = small.settings(epochs=2, batch=6)
    spec = _spec(name, root)
    train(small.plan(), tmp_path / "whole", settings=settings, data=open_data(spec, small.SHAPE, seed=0))
    with pytest.raises(Stopped):
        train(small.plan(), tmp_path / "run", settings=settings, data=small.interrupting(7, spec))
    data = open_data(spec, small.SHAPE, seed=0)
    train(small.plan(), tmp_path / "run", settings=settings, data=data, resume=True)
    assert small.same(small.weights(tmp_path / "run"), small.weights(tmp_path / "whole"))
    assert all(epoch.right for epoch in check_ledger(tmp_path / "run" / "ledger.bin", 6))


def test_a_shard_is_indexed_once(tars, cache, monkeypatch):
    open_data(_spec("webdataset", tars), (3, 8, 8), 0)
    assert len(list((cache / "graphopt" / "shards").iterdir())) == 8
    monkeypatch.setattr(shards, "_scan", None)
    open_data(_spec("webdataset", tars), (3, 8, 8), 0)


def _png() -> bytes:
    file = io.BytesIO()
    images()[0].save(file, "png")
    return file.getvalue()


def _write(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _pair(root: Path, label: bytes = b"1") -> Path:
    """A shard of two samples."""
    _write(root / "train-000.tar", [("a.png", _png()), ("a.cls", label), ("b.png", _png()), ("b.cls", b"0")])
    return root


def classes(root: Path) -> list[int]:
    return shards.open_shards(root, ["train"])[1]


@pytest.mark.parametrize("change", ["1]]", "[]", "{}", "null", "\ufffd", "{" * 2000])
def test_a_damaged_index_is_made_anew(tmp_path, cache, change):
    _pair(tmp_path)
    assert classes(tmp_path) == [1, 0]
    for file in (cache / "graphopt" / "shards").iterdir():
        text = file.read_text()
        file.write_text(text.replace(", 1]", ", 0]") if change == "1]]" else change)
        assert file.read_text() != text
    assert classes(tmp_path) == [1, 0]


def test_a_shard_that_was_replaced_with_its_size_and_time_is_indexed_anew(tmp_path):
    shard = _pair(tmp_path) / "train-000.tar"
    assert classes(tmp_path) == [1, 0]
    status = shard.stat()
    _pair(tmp_path, label=b"0")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size
    assert classes(tmp_path) == [0, 0]


def test_without_a_home_shards_are_indexed_each_time(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(shards, "cache_folder", _homeless)
    assert classes(_pair(tmp_path)) == [1, 0]


def _homeless(_: str) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", _png())], r"000\.tar, a: has no class"),
        ([("a.cls", b"1")], r"000\.tar, a: has no image"),
        ([("a.png", _png()), ("a.cls", b"1"), ("a.png", _png())], r"000\.tar, a\.png: has a key that the shard has had before"),
        ([("a.png", _png()), ("a.cls", b"cat")], r"000\.tar, a\.cls: is 'cat', not the number of a class"),
        ([("a.png", b"noise"), ("a.cls", b"0")], r"000\.tar, a\.png: the image cannot be read"),
    ],
    ids=["class", "image", "duplicate", "text", "noise"],
)
def test_wrong_members_are_named(tmp_path, members, message):
    for split in ("train", "val"):
        _write(tmp_path / split / "000.tar", members)
    with pytest.raises(RunError, match=message):
        list(ImageFeed(open_data(_spec("webdataset", tmp_path), (3, 8, 8), 0).train, 1).batches(0))


@pytest.mark.parametrize("how", ["missing", "cut", "header", "end", "twice", "split", "compressed"])
def test_wrong_shards_are_named(tmp_path, tars, how):
    root = tmp_path / "root"
    shutil.copytree(tars, root)
    shard = root / "set-train-0001.tar"
    content = bytearray(shard.read_bytes())
    message = r"set-train-0001\.tar: the shard is damaged"
    if how == "missing":
        shard.unlink()
        message = r"shards are missing: set-train-0001\.tar"
    elif how == "cut":
        shard.write_bytes(content[: len(content) // 3])
    elif how == "header":
        second = content.index(b"ustar", 600)
        content[second - 100] ^= 255
        shard.write_bytes(content)
    elif how == "end":
        shard.write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))
    elif how == "twice":
        shutil.copy(shard, root / "set-train-0004.tar")
        message = r"set-train-0004\.tar, train/0005\.png: key 'train/0005' is in set-train-0001\.tar already"
    elif how == "compressed":
        import gzip

        shard.write_bytes(gzip.compress(content))
    else:
        for shard in root.glob("*val*"):
            shard.unlink()
        message = "no tar file of val or validation"
    with pytest.raises(RunError, match=message):
        open_data(_spec("webdataset", root), (3, 8, 8), 0)


def test_what_is_wrong_with_arrow_folders(tmp_path, arrow, monkeypatch):
    with pytest.raises(RunError, match=r"has no split extra.*It has train, test"):
        open_data(_spec("arrow", arrow, train_split="extra"), (3, 8, 8), 0)
    damaged = tmp_path / "damaged"
    shutil.copytree(arrow, damaged)
    (file,) = (damaged / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(RunError, match=r"arrow \(train\) is missing or damaged under"):
        open_data(_spec("arrow", damaged), (3, 8, 8), 0)
    import datasets

    for name, table, message in (
        ("none", {"label": [0]}, "has no column of images"),
        ("null", {"img": images()[:1], "label": [None]}, r"row 0: the class is None"),
    ):
        kinds = {"img": datasets.Image(), "label": datasets.Value("int64")}
        made = datasets.Dataset.from_dict(table, features=datasets.Features({key: kinds[key] for key in table}))
        datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / name))
        with pytest.raises(RunError, match=message):
            open_data(_spec("arrow", tmp_path / name), (3, 8, 8), 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match=r"pip install graphopt\[arrow\]"):
        open_data(_spec("arrow", arrow), (3, 8, 8), 0)


def test_an_image_in_a_shard_that_is_damaged_is_named(tmp_path):
    """Its member is whole: it is decoded only when it is used."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number, image in enumerate(images()[:2]):
                file = io.BytesIO()
                image.save(file, "jpeg")
                for name, content in ((f"{number}.jpg", file.getvalue()[: 400 if number else None]), (f"{number}.cls", b"0")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with pytest.raises(RunError, match="the image cannot be read") as caught:
        open_data(_spec("webdataset", tmp_path), (3, 8, 8), 0).train[0, 1]
    assert str(caught.value).startswith(f"{tmp_path / 'train-0.tar'}, 1.jpg: ")
