"""Accuracy of local supervision on digits at equal epochs: end-to-end, feature reconstruction, InfoPro, greedy; mean and deviation.

    python tools/supervise_accuracy.py [--backbone resnet20 vit] [--modules 4] [--seeds 5] [--epochs 30] [--train 1000] [--out FILE]

scikit-learn's digits (1,797 images of 8 x 8): 1,000 are for training, drawn anew for every seed, and all others
for evaluation; no augmentation, the same optimizer and cosine schedule for every method, K modules with even cuts. "Greedy" has the
default head without a decoder; "InfoPro" its image decoder (weight 5) beside its classifier or supervised contrast. The difference to
greedy (of InfoPro's, to greedy with its head) is taken seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import heading
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.supervise import Supervise

IMAGES = {"mean": (0.5,), "std": (0.5,)}
METHODS: dict[str, dict[str, Any] | None] = {
    "end-to-end": None,
    "features (default)": {},
    "features, all positions": {"fraction": 1.0},
    "features, pointwise": {"structure": "pointwise"},
    "features, conv": {"structure": "conv"},
    "features, transformer": {"structure": "transformer"},
    "InfoPro, softmax": {"decoder": "image", "head": "conv", "weights": {"reconstruct": (5.0, 5.0)}, **IMAGES},
    "InfoPro, contrast": {"decoder": "image", "head": "contrast", "weights": {"reconstruct": (5.0, 5.0)}, **IMAGES},
    "greedy": {"decoder": "none"},
    "features, InfoPro's head": {"structure": "conv", "head": "conv"},
    "greedy, InfoPro's head": {"decoder": "none", "head": "conv"},
}


def backbone(name: str) -> nn.Module:
    if name == "vit":
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=8, num_heads=4
        )
    return cifar.build(name, in_chans=1)


def digits(seed: int, train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bunch = load_digits()
    x = (torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16 - 0.5) / 0.5
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order[:train]], y[order[:train]], x[order[train:]], y[order[train:]]


def run(name: str, label: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Accuracy, in per cent, and seconds of processor time, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.process_time()
    method = METHODS[label]
    module = backbone(name)
    if method is not None:
        value = Supervise(modules=options.modules, **method)
        module = graphopt.compile(module, value, input=(1, 8, 8), verify="off", costs=False).module
    module = copy.deepcopy(module)
    x, y, test_x, test_y = digits(seed, options.train)
    adam = name == "vit"
    peak = options.lr or (2e-3 if adam else 0.05)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(module.parameters(), peak, weight_decay=0.05)
        if adam
        else torch.optim.SGD(module.parameters(), peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    )
    steps = options.epochs * (len(x) // options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * 0.5 * (1 + math.cos(math.pi * s / steps)))
    module.train()
    for _ in range(options.epochs):
        for index in torch.randperm(len(x))[: len(x) // options.batch * options.batch].split(options.batch):
            out = module(x[index]) if method is None else module(x[index], y[index])
            output, local = (out, 0.0) if method is None else out
            optimizer.zero_grad()
            (F.cross_entropy(output, y[index]) + local).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (module.eval()(test_x).argmax(1) == test_y).float().mean().item()
    return 100 * accuracy, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet20", "vit"], help="a CIFAR ResNet by name, or vit (8 blocks of 48)")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        text = table(options, pool)
    print(text)
    if options.out:
        options.out.write_text(text)


def table(options: argparse.Namespace, pool: ProcessPoolExecutor) -> str:
    lines = [
        f"| backbone | method, K = {options.modules} | accuracy, % | deviation | less greedy | s a run |",
        "|" + " --- |" * 6,
    ]
    for name in options.backbone:
        found: dict[str, list[float]] = {}
        seconds: dict[str, float] = {}
        runs = {label: [pool.submit(run, name, label, seed, options) for seed in range(options.seeds)] for label in options.methods}
        for label, results in runs.items():
            found[label] = [r.result()[0] for r in results]
            seconds[label] = statistics.mean(r.result()[1] for r in results)
            print(name, label, [round(v, 2) for v in found[label]], flush=True)
        for label, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            rival = "greedy, InfoPro's head" if "InfoPro" in label else "greedy"
            beyond = [a - b for a, b in zip(values, found[rival], strict=True)] if rival in found else []
            error = f" ± {statistics.stdev(beyond) / math.sqrt(len(beyond)):.2f}" if len(beyond) > 1 else ""
            gain = f"{statistics.mean(beyond):+.2f}{error}" if beyond and label != rival else ""
            lines.append(f"| {name} | {label} | {statistics.mean(values):.2f} | {spread:.2f} | {gain} | {seconds[label]:.0f} |")
    note = f"{options.train} training images, {options.epochs} epochs, batch {options.batch}, {options.seeds} seeds. "
    note += "After ±: the standard error of the paired difference."
    return heading("Local supervision: accuracy on digits", __doc__) + f"\n{note}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
