"""CIFAR, SVHN and STL-10 in their own file formats: the published files, subsets of them, and copies that somebody has written again.

The files are read as data. Those of CIFAR are pickles, of which arrays, lists, texts and numbers are read and nothing is run.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from graphopt.errors import RunError, first_line

_FIX = "Copy it again, or write it in the published format"


class Arrays(NamedTuple):
    """`images[i]` is an RGB image and its class; the names of the classes."""

    images: "ArrayImages"
    targets: Sequence[int]
    classes: Sequence[str]


class ArrayImages:
    """Images in memory, (N, H, W, 3) uint8: `images[i]` is a PIL image and its class."""

    def __init__(self, data: np.ndarray, targets: Sequence[int]) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[number]), self.targets[number]


def open_cifar(root: Path, split: str, classes: int) -> Arrays:
    """A split of CIFAR-10 or CIFAR-100. Of the five files of CIFAR-10's training set, those that there are.

    A split may also be a corruption of CIFAR-10-C or -100-C, whose .npy files are in `root` or in its folder of that name.
    Raises OSError for missing files, RunError for one that is damaged or of another format.
    """
    if (found := corruption(root, split, classes)) is not None:
        return _corrupted(*found, classes)
    base, train, test = ("cifar-100-python", ("train",), "test") if classes == 100 else ("cifar-10-batches-py", _BATCHES, "test_batch")
    folder = root / base if (root / base).is_dir() else root
    names = [name for name in train if (folder / name).is_file()] or train[:1] if split == "train" else [test]
    parts = [_cifar_file(folder / name, classes) for name in names]
    meta = next((folder / name for name in ("meta", "batches.meta") if (folder / name).is_file()), None)
    table = _unpickled(meta) if meta is not None else {}
    titles = table.get("fine_label_names") or table.get("label_names") or range(classes)
    data, targets = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
    return _arrays(data.transpose(0, 2, 3, 1), targets, list(map(str, titles)), folder)


def corruption(root: Path, split: str, classes: int) -> tuple[Path, int] | None:
    """The file of a split of CIFAR-10-C or -100-C, and its severity: `"fog"` is all of it (0), `"fog-3"` its third fifth."""
    root = own if (own := root / f"CIFAR-{classes}-C").is_dir() else root
    name, dash, severity = split.rpartition("-")
    if dash and severity in ("1", "2", "3", "4", "5") and (root / f"{name}.npy").is_file():
        return root / f"{name}.npy", int(severity)
    return (root / f"{split}.npy", 0) if (root / f"{split}.npy").is_file() else None


def _corrupted(file: Path, severity: int, classes: int) -> Arrays:
    """Images of one corruption, (N, 32, 32, 3) in five severities one after the other, and their labels (arXiv 1903.12261)."""
    try:
        data, labels = (np.load(path, allow_pickle=False) for path in (file, file.with_name("labels.npy")))
    except ValueError as error:
        raise RunError(f"is damaged, or no array of pixels: {first_line(error)}", where=str(file), fix=_FIX) from error
    if data.dtype != np.uint8 or data.shape[1:] != (32, 32, 3) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise RunError(f"holds {data.dtype} {data.shape}, not uint8 (N, 32, 32, 3)", where=str(file), fix=_FIX)
    fifth = len(data) // 5
    part = slice((severity - 1) * fifth, severity * fifth) if severity else slice(None)
    return _arrays(data[part], labels[part].astype(np.int64), [str(number) for number in range(classes)], file)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def _cifar_file(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 3, 32, 32) and labels (N,) of one file."""
    table = _unpickled(file)
    key = "fine_labels" if classes == 100 else "labels"
    if not {"data", key} <= table.keys():
        raise RunError(f"is no file of CIFAR-{classes}: it has no 'data' and {key!r}", where=str(file), fix=_FIX)
    try:
        data = np.asarray(table["data"])
        if data.dtype != np.uint8:
            raise ValueError(f"its pixels are {data.dtype}, not uint8")
        return data.reshape(-1, 3, 32, 32), np.asarray(table[key], dtype=np.int64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"is damaged: {first_line(error)}", where=str(file), fix=_FIX) from error


def _unpickled(file: Path) -> dict[str, Any]:
    """The table in a pickle, keys as text. Raises OSError where there is no file, RunError for anything but plain values and arrays."""
    with file.open("rb") as opened:
        try:
            table = _Plain(opened, encoding="latin1").load()
        except Exception as error:  # a damaged pickle raises anything
            raise RunError(f"is damaged, or no pickle of plain values: {first_line(error)}", where=str(file), fix=_FIX) from error
    if not isinstance(table, dict):
        raise RunError(f"holds a {type(table).__name__}, not a table", where=str(file), fix=_FIX)
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in table.items()}


class _Plain(pickle.Unpickler):
    """Reads numpy arrays, besides what pickle itself knows; anything else that a file names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encoded
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module.replace("numpy.core", "numpy._core") in _NUMPY and name in _NUMPY[module.replace("numpy.core", "numpy._core")]:
            maker: Any = np.array(0).__reduce__()[0] if name == "_reconstruct" else _named(name)
            return maker
        raise pickle.UnpicklingError(f"it names {module}.{name}, which graphopt does not run")


#: functions by which numpy writes arrays and numbers, by their module
_NUMPY = {"numpy._core.multiarray": ("_reconstruct", "scalar"), "numpy._core.numeric": ("_frombuffer",)}


def _named(name: str) -> Any:
    return np.float64(0).__reduce__()[0] if name == "scalar" else np.zeros(1).__reduce_ex__(5)[0]


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding.replace("-", "").replace("_", "").lower() != "latin1":
        raise pickle.UnpicklingError(f"it has text in {encoding}")
    return text.encode("latin1")


def open_svhn(root: Path, split: str) -> Arrays:
    """A split of SVHN (cropped digits). Raises OSError for a missing file, RunError for one that is damaged or of another format."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # scipy has no type information

    file = root / f"{split}_32x32.mat"
    with file.open("rb") as opened:
        try:
            table = loadmat(opened)
            data, labels = table["X"], table["y"].astype(np.int64).reshape(-1)
        except Exception as error:  # scipy raises anything
            raise RunError(f"is damaged, or no file of SVHN: {first_line(error)}", where=str(file), fix=_FIX) from error
    if data.ndim != 4 or data.shape[2] != 3 or data.dtype != np.uint8:
        raise RunError(f"holds {data.dtype} {data.shape}, not uint8 (H, W, 3, N)", where=str(file), fix=_FIX)
    return _arrays(data.transpose(3, 0, 1, 2), labels % 10, [str(digit) for digit in range(10)], file)  # the digit 0 has label 10


def open_stl10(root: Path, split: str) -> Arrays:
    """A labelled split of STL-10. Raises OSError for a missing file, RunError for one whose size is no number of images."""
    folder = root / "stl10_binary" if (root / "stl10_binary").is_dir() else root
    file = folder / f"{split}_X.bin"
    pixels, labels = np.fromfile(file, np.uint8), np.fromfile(folder / f"{split}_y.bin", np.uint8)
    if len(pixels) % _STL10:
        raise RunError(f"is damaged: {len(pixels):,} bytes are no whole number of images of 96 pixels", where=str(file), fix=_FIX)
    names = (folder / "class_names.txt").read_text(encoding="utf-8").split("\n") if (folder / "class_names.txt").is_file() else []
    titles = [name for name in names if name] or [str(number) for number in range(1, 11)]
    # Columns come before rows in the file, and classes are counted from 1.
    return _arrays(pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1), labels.astype(np.int64) - 1, titles, file)


_STL10 = 3 * 96 * 96


def _arrays(data: np.ndarray, targets: np.ndarray, classes: Sequence[str], where: Path) -> Arrays:
    if len(data) != len(targets):
        raise RunError(f"has {len(data)} images and {len(targets)} labels", where=str(where), fix=_FIX)
    if not len(data):
        raise RunError("has no images", where=str(where), fix=_FIX)
    if targets.min() < 0 or targets.max() >= len(classes):
        what = f"has labels from {targets.min()} to {targets.max()}, there are {len(classes)} classes"
        raise RunError(what, where=str(where), fix=_FIX)
    labels = targets.tolist()
    return Arrays(ArrayImages(np.ascontiguousarray(data), labels), labels, classes)
