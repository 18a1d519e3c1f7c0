"""Data sets: the embedded digits, the usual ones in their own file formats, and folders of images.

Nothing is ever downloaded. A missing file is one error that says where it was expected and what belongs there.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets

from graphopt.errors import RunError, did_you_mean


class Images(Protocol):
    """Labelled images: `images[i]` is a PIL image and its class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Split:
    """One opened split: its images, their targets (known without opening them), and how many classes there are."""

    images: Images
    targets: Sequence[int]
    classes: int


@dataclass(frozen=True)
class Source:
    """A data set by name."""

    open: Callable[[Path, str], Split]  # takes root and split; may raise what the reading library raises
    splits: tuple[str, ...]  # the second is what "validation" means
    mean: tuple[float, ...]  # per channel, of images in 0..1
    std: tuple[float, ...]
    expects: str  # what the root folder must hold, for the error message


def _digits(_: Path, split: str) -> Split:
    """1,797 handwritten digits, 8x8 grey (scikit-learn's copy of UCI's optdigits test set). Every fifth of a class is held out."""
    from sklearn.datasets import load_digits  # a second to import, and only this data set needs it

    bunch = load_digits()
    pixels = np.clip(np.rint(bunch.images * (255 / 16)), 0, 255).astype(np.uint8)
    rank = np.empty(len(pixels), dtype=np.int64)  # how many of its class come before a sample
    for label in range(10):
        members = bunch.target == label
        rank[members] = np.arange(members.sum())
    chosen = (rank % 5 != 4) == (split == "train")
    targets = bunch.target[chosen].tolist()
    return Split([(Image.fromarray(image), target) for image, target in zip(pixels[chosen], targets, strict=True)], targets, 10)


def _torchvision(factory: Callable[..., Any], by_split: bool = False) -> Callable[[Path, str], Split]:
    def open_split(root: Path, split: str) -> Split:
        chosen = {"split": split} if by_split else {"train": split == "train"}
        images = factory(str(root), download=False, **chosen)
        targets = images.targets if hasattr(images, "targets") else images.labels
        classes = len(images.classes) if hasattr(images, "classes") else 10
        return Split(images, [int(target) for target in targets], classes)

    return open_split


_SYNONYMS = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "eval", "test")}


def _folder(root: Path, split: str) -> Split:
    names = _SYNONYMS.get(split, (split,))
    # The root itself may hold the splits, or a folder in it, as unpacked (imagenette2-320/train).
    bases = [root, *sorted(child for child in root.iterdir() if child.is_dir())]
    found = [base / name for base in bases for name in names if (base / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"no folder {' or '.join(names)}")
    images = datasets.ImageFolder(str(found[0]))
    return Split(images, images.targets, len(images.classes))


_IMAGENET = (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
_PER_CLASS = "train/ and val/ (or validation/, test/), each with one folder of images per class"


def _idx(name: str) -> str:
    return f"{name}/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"


SOURCES: dict[str, Source] = {
    "digits": Source(_digits, ("train", "validation"), (0.3053,), (0.3759,), "nothing: it is embedded"),
    "cifar10": Source(
        _torchvision(datasets.CIFAR10),
        ("train", "test"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "cifar-10-batches-py/, unpacked from cifar-10-python.tar.gz",
    ),
    "cifar100": Source(
        _torchvision(datasets.CIFAR100),
        ("train", "test"),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "cifar-100-python/, unpacked from cifar-100-python.tar.gz",
    ),
    "stl10": Source(
        _torchvision(datasets.STL10, by_split=True),
        ("train", "test"),
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        "stl10_binary/, unpacked from stl10_binary.tar.gz",
    ),
    "svhn": Source(
        _torchvision(datasets.SVHN, by_split=True),
        ("train", "test", "extra"),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        "train_32x32.mat and test_32x32.mat",
    ),
    "mnist": Source(_torchvision(datasets.MNIST), ("train", "test"), (0.1307,), (0.3081,), _idx("MNIST")),
    "fashion_mnist": Source(_torchvision(datasets.FashionMNIST), ("train", "test"), (0.2860,), (0.3530,), _idx("FashionMNIST")),
    "kmnist": Source(_torchvision(datasets.KMNIST), ("train", "test"), (0.1918,), (0.3483,), _idx("KMNIST")),
    "imagenette": Source(_folder, ("train", "validation"), *_IMAGENET, f"imagenette2/ (or -320, -160) with {_PER_CLASS}"),
    "imagenet": Source(_folder, ("train", "validation"), *_IMAGENET, _PER_CLASS),
    "folder": Source(_folder, (), *_IMAGENET, _PER_CLASS),
}


def source(name: str) -> Source:
    """The data set called `name`; case, `-` for `_`, and timm's prefix `torch/` do not matter. Raises RunError if there is none."""
    known = name.casefold().removeprefix("torch/").replace("-", "_")
    known = {"image_folder": "folder", "fashionmnist": "fashion_mnist"}.get(known, known)
    if known not in SOURCES:
        fix = did_you_mean(known, SOURCES) or f"There are {', '.join(SOURCES)}"
        raise RunError(f"there is no data set {name!r}", where="data.name", fix=fix)
    return SOURCES[known]


def open_split(name: str, root: str | None, split: str) -> Split:
    """One split of a data set. Raises RunError for an unknown split, no root, and files that are missing or damaged."""
    found = source(name)
    if found.splits:
        split = found.splits[1] if split in _SYNONYMS["validation"] and split not in found.splits else split
        if split not in found.splits:
            raise RunError(f"{name} has no split {split!r}", where="data", fix=f"It has {', '.join(found.splits)}")
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
