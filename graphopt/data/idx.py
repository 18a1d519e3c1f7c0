"""Images and labels in the files of MNIST and its family (idx, of bytes): http://yann.lecun.com/exdb/mnist."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from graphopt.errors import RunError

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


def open_idx(folder: Path, prefix: str, classes: int) -> IdxImages:
    """The images `<prefix>-images-idx3-ubyte` and their labels.

    Raises OSError for a missing file, RunError for one whose size is not what its header says, and labels that are no class.
    """
    files = [folder / f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (_read(file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    if len(images) != len(labels):
        raise RunError(f"has {len(labels)} labels, {files[0].name} has {len(images)} images", where=str(files[1]), fix=_FIX)
    if labels.max(initial=0) >= classes:
        raise RunError(f"has label {labels.max()}, there are {classes} classes", where=str(files[1]), fix=_FIX)
    return IdxImages(images, labels)


def _read(file: Path, dimensions: int) -> np.ndarray:
    content = file.read_bytes()
    head = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4))
    size = int(np.prod([*map(float, shape)]))  # of a damaged header, beyond any integer
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != head + size:
        raise RunError(f"is damaged: not an idx file of bytes in {dimensions} dimensions, or cut short", where=str(file), fix=_FIX)
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
