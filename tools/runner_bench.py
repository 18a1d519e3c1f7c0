"""The runner against a tight loop written by hand: images per second of processor time, epochs of both in turns in one process.

    python tools/runner_bench.py [--epochs 9] [--steps 10] [--out tools/tables/runner.md]

Both train the same network on digits with the same optimizer and cosine schedule, on one thread. The loop has its batches as tensors in
a list; it computes the loss, its gradients and the step, and nothing else. The runner loads its batches, counts correct predictions, logs,
seeds, checks and listens for signals. The first epoch of both is not counted. A ratio is that of two neighbouring epochs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from epochs import trained_by
from machine import heading
from torch import nn

import graphopt
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.spec import AugmentSpec, DataSpec, TrainSpec
from graphopt.train import train
from graphopt.train.optimizer import Schedule, build_optimizer
from graphopt.train.run import Run

#: what is trained, the side of its images, the batch, and how the data is augmented
CASES: dict[str, tuple[Callable[[], nn.Module], int, int, AugmentSpec]] = {
    "ResNet-20, 32 px, batch 64": (lambda: CifarResNet(20), 32, 64, AugmentSpec()),
    "ResNet-20, 8 px, batch 64": (lambda: CifarResNet(20), 8, 64, AugmentSpec()),
    "ViT, 32 px, batch 64": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10), 32, 64, AugmentSpec(),
    ),
    "ResNet-20, 32 px, batch 64, crops and flips": (lambda: CifarResNet(20), 32, 64, AugmentSpec(crop="pad", hflip=0.5)),
}  # fmt: skip


class Loop:
    """What somebody writes who wants nothing but speed."""

    def __init__(self, model: nn.Module, settings: TrainSpec, steps: int) -> None:
        self.model, self.optimizer = model, build_optimizer(model, settings.optimizer)
        self.schedule, self.done = Schedule(self.optimizer, settings, steps), 0

    def epoch(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.model.train()
        losses = []
        for images, targets in batches:
            self.schedule.set_step(self.done)
            self.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.model(images), targets)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.done += 1
        torch.stack(losses).tolist()


def in_turns(loop: Loop, seconds: dict[str, list[float]]) -> AbstractContextManager[None]:
    """Inside, every epoch of the runner is followed by one of the loop on the same images."""

    def timed(run: Run, train_on: Callable[[], bool]) -> bool:
        began = time.process_time()
        ended = train_on()
        seconds["runner"].append(time.process_time() - began)
        batches = [(batch.input, batch.target) for batch in run.state.phase.feed.batches(run.progress.epoch)]
        began = time.process_time()
        loop.epoch(batches)
        seconds["loop"].append(time.process_time() - began)
        return ended

    return trained_by(timed)


def measured(name: str, epochs: int, steps: int) -> dict[str, list[float]]:
    """Seconds of processor time per epoch, without the first."""
    make, side, batch, augment = CASES[name]
    torch.manual_seed(0)
    model, shape = make(), (3, side, side)
    table: dict[str, Any] = {"epochs": epochs + 1, "batch": batch, "device": "cpu", "optimizer": {"name": "sgd", "lr": 0.01}}
    settings = TrainSpec.model_validate(table | {"eval_every": epochs + 1})
    plan = graphopt.compile(deepcopy(model), [], input=shape, verify="off", costs=False)
    seconds: dict[str, list[float]] = {"runner": [], "loop": []}
    data = DataSpec(name="digits", train_limit=batch * steps, eval_limit=batch, augment=augment)
    with tempfile.TemporaryDirectory() as folder, in_turns(Loop(model, settings, steps), seconds):
        train(plan, Path(folder, "run"), settings=settings, data=data)
    return {what: found[1:] for what, found in seconds.items()}


def ratios(name: str, epochs: int, steps: int) -> list[float]:
    """Images per second of the runner over those of the loop, by epoch."""
    found = measured(name, epochs, steps)
    return [loop / runner for loop, runner in zip(found["loop"], found["runner"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="per epoch")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| | loop, images/s | runner, images/s | runner / loop: quartiles |", "|---|---|---|---|"]
    for name in options.cases:
        found = measured(name, options.epochs, options.steps)
        images = CASES[name][2] * options.steps
        rates = [images / statistics.median(found[what]) for what in ("loop", "runner")]
        by_epoch = [loop / runner for loop, runner in zip(found["loop"], found["runner"], strict=True)]
        quartiles = " / ".join(f"{value:.3f}" for value in statistics.quantiles(by_epoch, n=4, method="inclusive"))
        lines.append(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {quartiles} |")
        print(lines[-1], flush=True)
    text = "\n".join([heading("The runner against a loop written by hand", __doc__), *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
