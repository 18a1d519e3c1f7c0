"""Data sets: the embedded digits, the usual ones in their own file formats, and folders, tar shards or arrow tables of images.

Nothing is ever downloaded. A missing file is one error that says where it was expected and what belongs there.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from graphopt.data.arrow import open_arrow
from graphopt.data.idx import open_idx
from graphopt.data.published import corruption, open_cifar, open_stl10, open_svhn
from graphopt.data.shards import open_shards
from graphopt.errors import RunError, did_you_mean


@dataclass(frozen=True)
class Split:
    """One opened split: its images, their targets (known without opening them), and the names of the classes."""

    images: Any  # `images[i]` is a PIL image and its class
    targets: Sequence[int]
    classes: Sequence[str]

    def outline(self, chosen: Sequence[int]) -> str:
        """Changes with a target, a class, or what is chosen, and with no file."""
        return hashlib.sha256(json.dumps([list(self.classes), list(self.targets), list(chosen)]).encode()).hexdigest()

    def fingerprint(self, chosen: Sequence[int]) -> str:
        """Changes with a target, a class, and the name, size or time of a chosen image's file; of images in memory, with every pixel."""
        digest = hashlib.sha256(self.outline(chosen).encode())
        if hasattr(self.images, "fingerprint"):
            digest.update(self.images.fingerprint())
        elif hasattr(self.images, "samples"):
            for path, _ in (self.images.samples[number] for number in chosen):
                found = os.stat(path)
                digest.update(os.fsencode(f"{path.removeprefix(self.images.root)} {found.st_size} {found.st_mtime_ns}\n"))
        elif hasattr(self.images, "data"):
            digest.update(np.ascontiguousarray(self.images.data).data)
        elif isinstance(self.images, list):
            for image, _ in self.images:
                digest.update(image.tobytes())
        return digest.hexdigest()


class Source(NamedTuple):
    """A data set by name."""

    open: Callable[[Path, str], Split]  # takes root and split; may raise what the reading library raises
    expects: str  # what the root folder must hold, for the error message
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # per channel, of images in 0..1
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    splits: tuple[str, ...] = ("train", "test")  # the second is what "validation" means
    corrupted: bool = False  # whether its root may hold corruptions as further splits


_DIGITS = tuple("0123456789")


class _Digits(list[tuple[Image.Image, int]]):
    """Images and classes; `data` are the pixels of all, (N, 8, 8) uint8."""

    def __init__(self, data: np.ndarray, targets: Sequence[int]) -> None:
        super().__init__((Image.fromarray(image), target) for image, target in zip(data, targets, strict=True))
        self.data = data


@cache  # for programs that open it again and again
def _digits(split: str) -> Split:
    """1,797 handwritten digits, 8x8 grey (scikit-learn's copy of UCI's optdigits test set). Every fifth of a class is held out."""
    table = _digits_table()
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    pixels = np.clip(np.rint(images * (255 / 16)), 0, 255).astype(np.uint8)
    rank = np.empty(len(pixels), dtype=np.int64)  # how many of its class come before a sample
    for label in range(10):
        members = labels == label
        rank[members] = np.arange(members.sum())
    chosen = (rank % 5 != 4) == (split == "train")
    targets = labels[chosen].tolist()
    return Split(_Digits(pixels[chosen], targets), targets, _DIGITS)


def _digits_table() -> Any:
    """(1797, 65) int64: 64 pixels in 0..16, then the class. Read without scikit-learn's code, which takes a second to import."""
    package = find_spec("sklearn")
    assert package is not None  # a dependency
    assert package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        return np.array(file.read().replace(b"\n", b",").strip(b",").split(b","), dtype=np.int64).reshape(-1, 65)


def _idx(family: Any) -> Callable[[Path, str], Split]:
    def open_split(root: Path, split: str) -> Split:
        prefix = "train" if split == "train" else "t10k"
        folders = [root / family.__name__ / "raw", root / family.__name__, root / "raw", root]
        images = open_idx(folders, prefix, len(family.classes))
        return Split(images, images.targets.tolist(), family.classes)

    return open_split


def _svhn(root: Path, split: str) -> Split:
    return Split(*open_svhn(root, split))


def _stl10(root: Path, split: str) -> Split:
    return Split(*open_stl10(root, split))


def _cifar(classes: int) -> Callable[[Path, str], Split]:
    return lambda root, split: Split(*open_cifar(root, split, classes))


_SYNONYMS = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "eval", "test")}


def _folder(root: Path, split: str) -> Split:
    names = _SYNONYMS.get(split, (split,))
    # The root itself may hold the splits, or a folder in it, as unpacked (imagenette2-320/train).
    bases = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    found = [base / name for base in bases for name in names if (base / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"no folder {' or '.join(names)}")
    images = _ImageFolder(str(found[0]), loader=Image.open)  # who asks for an image decodes it
    return Split(images, images.targets, images.classes)


def _shards(root: Path, split: str) -> Split:
    return Split(*open_shards(root, _SYNONYMS.get(split, (split,))))


def _arrow(root: Path, split: str) -> Split:
    return Split(*open_arrow(root, _SYNONYMS.get(split, (split,))))


class _ImageFolder(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """torchvision's, which follows links, but reads no folder twice (a link may lead back), and nothing that is no file."""

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        seen = {_identity(directory): directory}
        samples: list[tuple[str, int]] = []
        for name, label in sorted(class_to_idx.items()):
            found, pending = [], [os.path.join(directory, name)]
            while pending:
                folder = pending.pop()
                first = seen.setdefault(_identity(folder), folder)
                if first != folder:
                    raise RunError(f"is the same folder as {first}", where=folder, fix="Remove the link: images may be read once only")
                for entry in os.scandir(folder):
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif entry.name.lower().endswith(IMG_EXTENSIONS):
                        if not entry.is_file():
                            raise RunError("is neither a file nor a link to one", where=entry.path, fix="Take it out of the data set")
                        found.append((folder, entry.name))
            if not found:
                raise FileNotFoundError(f"no image in {name}/")
            samples += [(os.path.join(*parts), label) for parts in sorted(found)]
        return samples


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


_CIFAR10 = "cifar-10-batches-py/, unpacked from cifar-10-python.tar.gz, or files of that format"
_CIFAR100 = "cifar-100-python/, unpacked from cifar-100-python.tar.gz, or files of that format"
_STL10 = "stl10_binary/, unpacked from stl10_binary.tar.gz, or files of that format"
_SVHN = "train_32x32.mat and test_32x32.mat"
_MNIST = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, or their .gz"
_CLASSES = "train/ and val/ (or validation/, test/), each with one folder of images per class"
_SHARDS = "tar files in train/ and val/ (or with these words in their names), with an image and a .cls member for each key"
_HELD_OUT = ("train", "validation")

SOURCES = {
    "digits": Source(lambda _, split: _digits(split), "nothing: it is embedded", (0.3053,), (0.3759,), _HELD_OUT),
    "cifar10": Source(_cifar(10), _CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), corrupted=True),
    "cifar100": Source(_cifar(100), _CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), corrupted=True),
    "stl10": Source(_stl10, _STL10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "svhn": Source(_svhn, _SVHN, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), ("train", "test", "extra")),
    "mnist": Source(_idx(datasets.MNIST), _MNIST, (0.1307,), (0.3081,)),
    "fashion_mnist": Source(_idx(datasets.FashionMNIST), _MNIST, (0.2860,), (0.3530,)),
    "kmnist": Source(_idx(datasets.KMNIST), _MNIST, (0.1918,), (0.3483,)),
    "imagenette": Source(_folder, f"imagenette2/ (or -320, -160) with {_CLASSES}", splits=_HELD_OUT),
    "imagenet": Source(_folder, _CLASSES, splits=_HELD_OUT),
    "folder": Source(_folder, _CLASSES, splits=()),
    "webdataset": Source(_shards, _SHARDS, splits=()),
    "arrow": Source(_arrow, "what `save_to_disk` of a DatasetDict has written", splits=()),
}


def source(name: str) -> Source:
    """The data set called `name`; case, `-` for `_`, and timm's prefix `torch/` do not matter. Raises RunError if there is none."""
    known = name.casefold().removeprefix("torch/").replace("-", "_")
    known = {"image_folder": "folder", "wds": "webdataset", "fashionmnist": "fashion_mnist"}.get(known, known)
    if known not in SOURCES:
        fix = did_you_mean(known, SOURCES) or f"There are {', '.join(SOURCES)}"
        raise RunError(f"there is no data set {name!r}", where="data.name", fix=fix)
    return SOURCES[known]


def _corruption(name: str, root: str | None, split: str) -> tuple[Path, int] | None:
    return corruption(Path(os.path.expanduser(root or "")), split, 100 if name == "cifar100" else 10)


def open_split(name: str, root: str | None, split: str) -> Split:
    """One split of a data set. Raises RunError for an unknown split, no root, and files that are missing or damaged."""
    found = source(name)
    if found.splits:
        split = found.splits[1] if split in _SYNONYMS["validation"] and split not in found.splits else split
        if split not in found.splits and not (found.corrupted and _corruption(name, root, split)):
            more = ", and one for each .npy file of its corruptions in the folder" if found.corrupted else ""
            raise RunError(f"{name} has no split {split!r}", where="data", fix=f"It has {', '.join(found.splits)}{more}")
    if found is SOURCES["digits"]:
        return found.open(Path(), split)
    wanted = f"It must hold {found.expects}; graphopt never downloads"
    if root is None:
        raise RunError(f"{name} needs a folder", where="data.root", fix=wanted)
    folder = Path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise RunError(f"there is no folder {folder.absolute()}", where="data.root", fix=wanted)
    try:
        return found.open(folder, split)
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, ImportError) as error:
        reason = str(error).split(". You can use download")[0].splitlines()[0]
        what = f"{name} ({split}) is missing or damaged under {folder.absolute()} ({reason})"
        raise RunError(what, where="data.root", fix=wanted) from error
