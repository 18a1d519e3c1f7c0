"""What cached features cost in accuracy under random crops and flips: ResNet-20 at 28 px, layer2 dropped after 3 of 10 epochs.

    nice python tools/drop_augmented.py --root /usr/share/datasets/fashion-mnist --results build/drop.jsonl \
        --out tools/tables/drop_augmented.md

Per seed: plain training; the prefix run in every step without gradients (`cache = "none"`); and cached features: one or four fixed views of
each sample, one view that is computed anew every 4 epochs, and maps that are cropped anew in each epoch (`crops`), with both flips
cached (`views = 2`) or with flips drawn anew every 4 epochs. Points are against plain training with the same seed. Processor time is of
the epochs behind the cut, the filling of the cache included, over that of plain training.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from fashion import CAPTION, Runs, compare, points, ratio, table
from machine import heading

from graphopt.units import show_size

EPOCHS, CUT = 10, 3


def _drop(**options: Any) -> list[dict[str, Any]]:
    return [{"use": "drop", "upto": "layer2", "when": {"epoch": CUT}, "force": options.get("cache") != "none", **options}]


METHODS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "prefix without gradients": _drop(cache="none"),
    "refresh = 4": _drop(refresh=4),
    "crops, views = 2": _drop(crops=True, views=2),
    "1 fixed view": _drop(views=1),
    "4 fixed views": _drop(views=4),
    "crops, refresh = 4": _drop(crops=True, refresh=4),
}


def show(found: Mapping[str, Runs]) -> str:
    rows = []
    for name, runs in found.items():
        own, size = name == "plain", sum(record.get("bytes", 0) for record in next(iter(runs.values())).features)
        mean = f"{statistics.mean(run.accuracy for run in runs.values()):.2f}"
        shown = "" if own else points(runs, found["plain"])
        rows.append((name, str(len(runs)), mean, shown, ratio(runs, found["plain"], CUT), show_size(size) if size else ""))
    columns = ("method", "seeds", "accuracy, %", "points", "time behind the cut", "cache")
    return heading("drop under random crops and flips", __doc__) + CAPTION + table(columns, rows)


if __name__ == "__main__":
    compare(METHODS, __doc__, EPOCHS, show)
