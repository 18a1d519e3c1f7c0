"""Files in the published formats that are not the published files: subsets, copies written again, .gz files. No code of theirs runs."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from graphopt import RunError
from graphopt.data.datasets import open_split
from tests.data import formats

CIFAR = {
    "array, list": lambda data, labels: {"data": data, "labels": labels.tolist()},
    "keys as bytes": lambda data, labels: {b"data": data, b"labels": labels.tolist(), b"batch_label": b"training"},
    "numpy's numbers": lambda data, labels: {"data": data, "labels": list(labels)},
    "images apart": lambda data, labels: {"data": data.reshape(-1, 3, 32, 32), "labels": labels.astype(np.int32)},
}


def cifar(root: Path, write: Any, protocol: int, count: int = 7) -> np.ndarray:
    """A training set of one file and a test set, without a table of names."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    data, labels = formats.pixels(count, 3072), formats.labels(count)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(write(data, labels), protocol))
    return data


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_written_again(kind: str, protocol: int, tmp_path: Path) -> None:
    data = cifar(tmp_path, CIFAR[kind], protocol)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = open_split("cifar10", str(root), "train")
        assert (len(found.images), found.targets, len(found.classes)) == (7, [0, 1, 2, 3, 4, 5, 6], 10)
        image, label = found.images[3]
        assert label == 3
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), data[3])


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("evil", [Evil(), np.array([Evil()], dtype=object)], ids=["named", "in an array"])
def test_no_code_of_a_pickle_runs(evil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, lambda data, labels: {"data": data, "labels": labels, "more": evil}, 4)
    with pytest.raises(RunError, match=r"data_batch_1: is damaged, or no pickle of plain values: it names \w+\.mkdir"):
        open_split("cifar10", str(tmp_path), "train")
    assert not Path("ran").exists()


def test_no_text_but_latin1_is_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"c_codecs\nencode\n(Va\nVzlib\ntR.")
    with pytest.raises(RunError, match="it has text in zlib"):
        open_split("cifar10", str(tmp_path), "train")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": np.zeros((2, 3072), np.uint8)}, "is no file of CIFAR-10: it has no 'data' and 'labels'"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "is damaged: cannot reshape"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "its pixels are float64, not uint8"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "has 2 images and 1 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "has labels from 0 to 10, there are 10 classes"),
        ([1], "holds a list, not a table"),
    ],
)
def test_what_is_no_cifar(table: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(table))
    with pytest.raises(RunError, match=message):
        open_split("cifar10", str(tmp_path), "train")


def test_a_part_of_svhn_and_of_stl10(tmp_path: Path) -> None:
    images = formats.pixels(5, 32, 32, 3)
    savemat(tmp_path / "test_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [2], [9], [3]], np.uint8)})
    found = open_split("svhn", str(tmp_path), "test")
    assert found.targets == [0, 1, 2, 9, 3]
    assert np.array_equal(np.asarray(found.images[4][0]), images[4])
    pixels = formats.pixels(3, 3, 96, 96)
    (tmp_path / "train_X.bin").write_bytes(pixels.tobytes())
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 10, 4]))
    found = open_split("stl10", str(tmp_path), "train")
    assert found.targets == [0, 9, 3]
    assert np.array_equal(np.asarray(found.images[1][0]), pixels[1].transpose(2, 1, 0))
    (tmp_path / "train_X.bin").write_bytes(pixels.tobytes()[:-1])
    with pytest.raises(RunError, match="are no whole number of images"):
        open_split("stl10", str(tmp_path), "train")
    (tmp_path / "test_32x32.mat").write_bytes(b"junk")
    with pytest.raises(RunError, match="is damaged, or no file of SVHN"):
        open_split("svhn", str(tmp_path), "test")


def test_the_corruptions_of_cifar_10_c(tmp_path: Path) -> None:
    images, labels = formats.pixels(10, 32, 32, 3), formats.labels(10)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    assert len(open_split("cifar10", str(tmp_path), "fog").images) == 10
    found = open_split("cifar10", str(tmp_path), "fog-3")
    assert found.targets == [4, 5]
    assert np.array_equal(np.asarray(found.images[1][0]), images[5])
    with pytest.raises(RunError, match="cifar10 has no split 'snow'"):
        open_split("cifar10", str(tmp_path), "snow")
    np.save(tmp_path / "snow.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(RunError, match=r"snow\.npy: is damaged, or no array of pixels"):
        open_split("cifar10", str(tmp_path), "snow")


def test_the_corruptions_in_their_own_folder(tmp_path: Path) -> None:
    for classes in (10, 100):
        (folder := tmp_path / f"CIFAR-{classes}-C").mkdir()
        np.save(folder / "fog.npy", formats.pixels(5, 32, 32, 3))
        np.save(folder / "labels.npy", formats.labels(5) + classes - 10)
    assert open_split("cifar10", str(tmp_path), "fog").targets[0] == 0
    assert open_split("cifar100", str(tmp_path), "fog").targets[0] == 90


def zipped(root: Path, into: Path, dot: bool) -> None:
    into.mkdir(parents=True)
    for file in (root / "FashionMNIST" / "raw").iterdir():
        name = file.name.replace("-idx", ".idx") if dot else file.name
        (into / f"{name}.gz").write_bytes(gzip.compress(file.read_bytes()))


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("dot", [False, True])
def test_the_family_of_mnist_as_it_is_shipped(where: str, dot: bool, tmp_path: Path) -> None:
    formats.idx(tmp_path / "plain", "FashionMNIST")
    zipped(tmp_path / "plain", tmp_path / "packed" / where, dot)
    plain, packed = (open_split("fashion_mnist", str(tmp_path / name), "validation") for name in ("plain", "packed"))
    assert packed.targets == plain.targets
    assert packed.fingerprint([0]) == plain.fingerprint([0])
    for file in (tmp_path / "packed" / where).glob("t10k*"):
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(RunError, match=r"t10k.*gz: is damaged"):
            open_split("fashion_mnist", str(tmp_path / "packed"), "validation")


SHIPPED = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_ships_it() -> None:
    found = open_split("fashion_mnist", str(SHIPPED), "test")
    assert len(found.images) == 10_000
    assert [found.targets.count(label) for label in range(10)] == [1000] * 10
