"""What cached features cost in accuracy under random crops and flips: Fashion-MNIST, ResNet-8, a prefix dropped half way.

    nice python tools/drop_augmented.py --root /usr/share/datasets/fashion-mnist --seeds 3 --out tools/tables/drop_augmented.md

Per seed: plain training; the prefix run in every step without gradients (`cache = "none"`); and features cached with one or four fixed
views of each sample, or one view that is computed anew every 2 or 4 epochs. Points are against plain training with the same seed.
Processor time is of the epochs behind the cut, the filling of the cache and evaluation included, over that of plain training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import heading

from graphopt.spec import from_table
from graphopt.train import train
from graphopt.train.run import Run
from graphopt.units import show_size

EPOCHS, CUT = 6, 3
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "prefix without gradients": {"cache": "none"},
    "1 fixed view": {"views": 1},
    "4 fixed views": {"views": 4},
    "refresh = 2": {"refresh": 2},
    "refresh = 4": {"refresh": 4},
}


def run(options: Mapping[str, Any] | None, seed: int, root: str, limit: int) -> dict[str, float]:
    """Accuracy, bytes of features, and processor seconds from the epoch of the cut on."""
    table: dict[str, Any] = {
        "backbone": {"source": "cifar", "name": "resnet8", "input": [3, 28, 28]},
        "data": {"name": "fashion_mnist", "root": root, "train_limit": limit, "eval_limit": 1000, "augment": {"crop": "pad", "hflip": 0.5}},
        "train": {"epochs": EPOCHS, "batch": 64, "seed": seed, "device": "cpu", "optimizer": {"lr": 0.1}},
    }
    if options is not None:
        force = {} if options.get("cache") == "none" else {"force": True}
        table["pass"] = [{"use": "drop", "upto": "layer2", "when": {"epoch": CUT}, **options, **force}]
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        close = Run._close_epoch

        def noted(self: Run) -> None:
            close(self)
            stamps.append(time.process_time())

        Run._close_epoch = noted  # type: ignore[method-assign]  # watched for this tool
        try:
            summary = train(from_table(table), Path(folder) / "run")
        finally:
            Run._close_epoch = close  # type: ignore[method-assign]  # watched for this tool
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        size = sum(line.get("bytes", 0) for line in lines if line["kind"] == "features")
    return {"accuracy": 100 * summary.accuracy, "bytes": size, "seconds": stamps[-1] - stamps[CUT - 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the published files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1500, help="training images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in range(options.seeds):
        for name, method in METHODS.items():
            found[name].append(run(method, seed, options.root, options.limit))
            print(seed, name, found[name][-1], flush=True)
            _write(found, options.out)


def _write(found: Mapping[str, list[dict[str, float]]], out: Path | None) -> None:
    """What there is so far: a run that is stopped has not been for nothing."""
    columns = ("method", "accuracy, %", "points", "time behind the cut", "cache")
    lines = [heading("drop under random crops and flips", __doc__), f"\n| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in found.items():
        if runs:
            pairs = list(zip(runs, found["plain"], strict=False))
            points = [mine["accuracy"] - plain["accuracy"] for mine, plain in pairs]
            spread = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
            ratio = statistics.mean(mine["seconds"] / plain["seconds"] for mine, plain in pairs)
            accuracy, size = statistics.mean(r["accuracy"] for r in runs), int(runs[0]["bytes"])
            shown = "" if name == "plain" else f"{statistics.mean(points):+.2f}{spread}"
            lines.append(f"| {name} | {accuracy:.2f} | {shown} | {ratio:.2f} | {show_size(size) if size else ''} |")
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
