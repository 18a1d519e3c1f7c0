"""Images in an arrow folder, as Hugging Face's `datasets` saves it (`save_to_disk`); that library reads it, by random access."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graphopt.errors import RunError, listed


class ArrowImages(NamedTuple):
    """`images[i]` is a PIL image and its class."""

    table: Any  # datasets.Dataset
    image: str  # its columns
    label: str
    folder: Path

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: Any) -> Any:
        row = self.table[int(number)]
        return row[self.image], row[self.label]

    def name(self, number: int) -> str:
        """Where an image is, for messages."""
        return f"{self.folder}, row {number}"

    def fingerprint(self) -> bytes:
        """Changes with the table, and with the size or the time of a file that it is read from."""
        files = [(file["filename"], Path(file["filename"]).stat()) for file in self.table.cache_files]
        return json.dumps([self.table._fingerprint, *((name, s.st_size, s.st_mtime_ns) for name, s in files)]).encode()


def open_arrow(root: Path, names: Sequence[str]) -> tuple[ArrowImages, list[int], list[str]]:
    """The images of a split (one of `names`), their classes, and the names of all classes.

    Raises RunError if the library is not installed, there is no such split, or the table has not one column of images and one of classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise RunError("arrow folders need the library datasets", where="data.name", fix="Run `pip install graphopt[arrow]`") from error
    tables = datasets.load_from_disk(str(root))
    if not isinstance(tables, datasets.DatasetDict):
        raise RunError("is a table without splits", where=str(root), fix="Save a DatasetDict, with a table for each split")
    split = next((name for name in names if name in tables), None)
    if split is None:
        raise RunError(f"has no split {' or '.join(names)}", where=str(root), fix=f"It has {', '.join(tables)}")
    table = tables[split]
    image = _column(root, table, "images", [n for n, kind in table.features.items() if isinstance(kind, datasets.Image)])
    named = [n for n, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    integers = [n for n, kind in table.features.items() if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))]
    label = _column(root, table, "classes", named or integers)
    targets = [_target(root / split, number, value) for number, value in enumerate(table[label])]
    if named:
        classes = list(table.features[label].names)
    else:
        classes = [str(n) for n in range(1 + max((max(other[label], default=-1) for other in tables.values()), default=-1))]
    return ArrowImages(table, image, label, root / split), targets, classes


def _column(root: Path, table: Any, what: str, found: list[str]) -> str:
    if len(found) == 1:
        return found[0]
    has = f"has {len(found)} columns of {what} ({listed(found)})" if found else f"has no column of {what}"
    raise RunError(f"{has}; its columns are {listed(table.column_names)}", where=str(root), fix="Select one of each before saving")


def _target(where: Path, number: int, value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise RunError(f"the class is {value!r}", where=f"{where}, row {number}", fix="Remove the row, or give it a class, from 0")
    return value
