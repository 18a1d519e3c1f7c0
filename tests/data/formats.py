"""Small data sets in the files that people download: the true formats, made from noise."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int = 10) -> np.ndarray:
    return np.arange(count) % classes


def _md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch, *, hundred: bool = False, count: int = 20) -> None:
    """torchvision checks the sums of the published files before it unpickles them; ours have sums of their own."""
    cls: Any = datasets.CIFAR100 if hundred else datasets.CIFAR10
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key, meta = (
        ("fine_labels", {"fine_label_names": [f"class {i}" for i in range(100)]})
        if hundred
        else (
            "labels",
            {"label_names": [f"class {i}" for i in range(10)]},
        )
    )
    for field in ("train_list", "test_list"):
        listed = []
        for seed, (name, _) in enumerate(getattr(cls, field)):
            data = {"data": pixels(count, 3072, seed=seed), key: labels(count, 100 if hundred else 10).tolist()}
            (folder / name).write_bytes(pickle.dumps(data))
            listed.append([name, _md5(folder / name)])
        monkeypatch.setattr(cls, field, listed)
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": _md5(folder / cls.meta["filename"])})


def idx(root: Path, name: str, count: int = 20) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        images, targets = pixels(count, 28, 28), labels(count).astype(np.uint8)
        header = b"\x00\x00\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + targets.tobytes())


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch, count: int = 20) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(pixels(count, 3, 96, 96).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels(count) + 1).astype(np.uint8).tobytes())
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    for field in ("train_list", "test_list"):
        listed = [[name, _md5(folder / name)] for name, _ in getattr(datasets.STL10, field) if (folder / name).exists()]
        monkeypatch.setattr(datasets.STL10, field, listed)


def svhn(root: Path, monkeypatch: pytest.MonkeyPatch, count: int = 20) -> None:
    root.mkdir(parents=True, exist_ok=True)
    listed = dict(datasets.SVHN.split_list)
    for split in ("train", "test"):
        url, name, _ = datasets.SVHN.split_list[split]
        # Images lie last axis first, and the digit 0 has the label 10.
        where = np.where(labels(count) == 0, 10, labels(count))[:, None].astype(np.uint8)
        savemat(root / name, {"X": pixels(count, 32, 32, 3).transpose(1, 2, 3, 0), "y": where})
        listed[split] = [url, name, _md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)


def folders(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: int = 3, count: int = 4) -> None:
    for split in splits:
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels(1, 40 + label, 50, 3, seed=number)[0])
                image.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}".replace("jpg", "JPEG"))
