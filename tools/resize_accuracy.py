"""Low frequencies of the first images beside plain resizing to the same size: Fashion-MNIST, ResNet-20 at 28 px, six epochs.

    nice python tools/resize_accuracy.py --root /usr/share/datasets/fashion-mnist --results build/resize.jsonl \
        --out tools/tables/resize_accuracy.md

The first four epochs are on smaller images, made by `how = "scale"` or by `how = "low-frequency"`, all others at 28 px, with random crops
and flips throughout. Points are against plain training with the same seed; processor time is of all epochs, loading included.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from fashion import CAPTION, Runs, compare, points, ratio, table
from machine import heading

EPOCHS, SMALL = 6, 4


def _small(side: int, how: str) -> list[dict[str, Any]]:
    return [{"use": "resize", "size": side, "how": how, "when": {"epoch": 0, "until": SMALL}}]


METHODS = {"plain": [], **{f"{side} px, {how}": _small(side, how) for side in (20, 14) for how in ("scale", "low-frequency")}}


def show(found: Mapping[str, Runs]) -> str:
    rows = []
    for name, runs in found.items():
        own = name == "plain"
        mean = statistics.mean(run.accuracy for run in runs.values())
        rows.append((name, str(len(runs)), f"{mean:.2f}", "" if own else points(runs, found["plain"]), ratio(runs, found["plain"])))
    columns = ("first epochs", "seeds", "accuracy, %", "points", "time")
    return heading("resize: plain resizing and low frequencies", __doc__) + CAPTION + table(columns, rows)


if __name__ == "__main__":
    compare(METHODS, __doc__, EPOCHS, show)
