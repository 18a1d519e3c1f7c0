"""Images and labels in the files of MNIST and its family (idx, of bytes): http://yann.lecun.com/exdb/mnist."""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from graphopt.errors import RunError, first_line

_FIX = "Copy it again"


@dataclass(frozen=True)
class IdxImages:
    """`images[i]` is a grey PIL image and its class."""

    data: np.ndarray  # (N, H, W) uint8
    targets: np.ndarray  # (N,) uint8

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[number]), int(self.targets[number])


def open_idx(folders: Sequence[Path], prefix: str, classes: int) -> IdxImages:
    """The images `<prefix>-images-idx3-ubyte` and their labels in the first of the folders that has them, as they are or in .gz files.

    Raises OSError for a missing file, RunError for one whose size is not what its header says, and labels that are no class.
    """
    files = [_find(folders, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    images, labels = (_read(file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    if len(images) != len(labels):
        raise RunError(f"has {len(labels)} labels, {files[0].name} has {len(images)} images", where=str(files[1]), fix=_FIX)
    if labels.max(initial=0) >= classes:
        raise RunError(f"has label {labels.max()}, there are {classes} classes", where=str(files[1]), fix=_FIX)
    return IdxImages(images, labels)


def _find(folders: Sequence[Path], name: str) -> Path:
    """A file under its name, with a dot in it as some archives have it, or compressed."""
    for folder in folders:
        for found in (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"):
            if (folder / found).is_file():
                return folder / found
    raise FileNotFoundError(f"no file {name}")


def _read(file: Path, dimensions: int) -> np.ndarray:
    content = _content(file)
    head = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4))
    size = int(np.prod([*map(float, shape)]))  # of a damaged header, beyond any integer
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != head + size:
        raise RunError(f"is damaged: not an idx file of bytes in {dimensions} dimensions, or cut short", where=str(file), fix=_FIX)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _content(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        return gzip.decompress(file.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RunError(f"is damaged: {first_line(error)}", where=str(file), fix=_FIX) from error
