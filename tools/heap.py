"""Processor time of a plain training step on the CPU, with glibc's own settings and inside `kept_heap`, which the runner uses.

    python tools/heap.py --out tools/tables/heap.md

Every row trains in two processes of its own, one per setting, with one thread. The peak is what the process grew by.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from machine import heading

from graphopt.models.cifar_resnet import CifarResNet
from graphopt.train.heap import kept_heap
from graphopt.train.strategy import Strategy

#: by name: network, pixels, batch
CASES = {
    "ResNet-110": (lambda: CifarResNet(110), 32, 32),
    "ViT, 6 blocks": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10), 32, 32),
    "ResNet-50": (torchvision.models.resnet50, 224, 8),
    "ViT, 4 blocks": (lambda: timm.create_model("vit_tiny_patch16_224", depth=4), 224, 16),
}


class Step(NamedTuple):
    """Medians over steps, and the peak of all."""

    seconds: float
    page_faults: float
    peak_bytes: int


def measured(name: str, keep: bool, steps: int) -> Step:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, pixels, batch = CASES[name]
    module, strategy = build(), Strategy(torch.device("cpu"))
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    images, targets = torch.randn(batch, 3, pixels, pixels), torch.zeros(batch, dtype=torch.long)
    seconds, faults = [], []
    with kept_heap() if keep else nullcontext():
        strategy.begin_memory(module)
        for _ in range(steps + 2):
            began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(module(images), targets).backward()
            optimizer.step()
            seconds.append(time.process_time() - began)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return Step(statistics.median(seconds[2:]), statistics.median(faults[2:]), strategy.peak_memory())


def row(name: str, steps: int) -> str:
    found = []
    for keep in (False, True):
        with get_context("spawn").Pool(1) as process:
            found.append(process.apply(measured, (name, keep, steps)))
    own, kept = found
    _, pixels, batch = CASES[name]
    times = f"{1e3 * own.seconds:.0f} | {1e3 * kept.seconds:.0f} | {kept.seconds / own.seconds:.2f}"
    peaks = f"{own.peak_bytes / 2**20:.0f} | {kept.peak_bytes / 2**20:.0f}"
    return f"| {name} | {pixels} | {batch} | {times} | {own.page_faults:,.0f} | {kept.page_faults:,.0f} | {peaks} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    head = (
        "| network | pixels | batch | ms of a step, glibc's settings | kept | ratio | page faults | kept | peak, MiB | kept |",
        "|---" * 10 + "|",
    )
    result = "\n".join([heading("Kept heap", __doc__), *head, *(row(name, options.steps) for name in CASES), ""])
    print(result)
    if options.out:
        options.out.write_text(result)


if __name__ == "__main__":
    main()
