"""What sharing costs in accuracy, on digits: five seeds, equal epochs, beside the same blocks simply removed, and simply frozen at random.

    python tools/share_accuracy.py [--seeds 5] [--epochs 6] [--depth 32] [--every 2] [--out tools/tables/share_accuracy.md]

A CIFAR ResNet on the 8x8 digits (1,442 train, 355 are held out). All rows train with the runner, the same data order and the same initial
weights per seed, and are measured after the last epoch. "Removed" is the drop pass in bypass mode, "frozen" the freeze pass, both on
the very blocks that share replaces. One image in the held-out set is 0.28 points: differences below the deviation mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import heading
from rich.console import Console

import graphopt
from graphopt import Pass
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train

INPUT = (1, 8, 8)


def variants(depth: int, every: int) -> dict[str, list[Pass]]:
    found = Share(every=every).match(graphopt.trace(CifarResNet(depth, in_chans=1), INPUT)).regions
    blocks = tuple(region.name for region in found)
    print(f"ResNet-{depth}, k = {every}: {', '.join(blocks)}", flush=True)
    return {
        "end-to-end": [],
        "mix": [Share(every=every)],
        "surrogate": [Share(every=every, mode="surrogate")],
        "the same blocks removed": [Drop(mode="bypass", select=blocks)],
        "the same blocks frozen at random": [Freeze(select=blocks)],
    }


def accuracy(passes: list[Pass], depth: int, seed: int, epochs: int) -> tuple[float, int]:
    """Held-out accuracy in percent after the last epoch, and the trainable parameters."""
    torch.manual_seed(seed)
    model = CifarResNet(depth, in_chans=1)
    plan = graphopt.compile(model, passes, input=INPUT, verify="off", costs=False)
    settings = TrainSpec.model_validate(
        {
            "epochs": epochs,
            "batch": 64,
            "seed": seed,
            "eval_every": epochs,
            "device": "cpu",
            "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4},
            "scheduler": {"name": "cosine", "warmup_epochs": 1},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        console = Console(quiet=True)
        summary = train(plan, Path(folder) / "run", settings=settings, data=DataSpec(name="digits"), console=console)
    return 100 * summary.accuracy, sum(p.numel() for p in plan.module.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    text = heading("share: accuracy on digits", __doc__)
    text += f"\nResNet-{options.depth}, k = {options.every}, {options.seeds} seeds, {options.epochs} epochs.\n\n"
    text += "| | accuracy, mean | deviation | each seed | trainable parameters |\n|---|---|---|---|---|\n"
    for name, passes in variants(options.depth, options.every).items():
        results = [accuracy(passes, options.depth, seed, options.epochs) for seed in range(options.seeds)]
        values = [value for value, _ in results]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{v:.1f}" for v in values)
        row = f"| {name} | {statistics.mean(values):.2f} | {deviation:.2f} | {each} | {results[0][1]:,} |"
        text += f"{row}\n"
        print(f"{row} {time.time() - start:.0f} s", flush=True)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
