"""What sharing saves: ResNet-32, ResNet-110, ResNet-50 and ViT-S at k = 2, 3 and 4, mix and surrogate, beside end-to-end, in one run.

    python tools/share_table.py [--models resnet110 ...] [--rounds 9] [--every 2 3 4] [--out tools/tables/share_table.md]

Parameters, optimizer bytes (SGD with momentum), FLOPs and peak activations are the forecast's, of one training step at the batch named.
Step times are measured: forward, loss, backward and optimizer step on one thread, at the smaller batch named, all variants taking turns
within every round; the ratio is the median over rounds of the ratio to end-to-end of the same round. Times are CPU time of the process,
which other work on the machine disturbs less than wall-clock time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from machine import heading
from torch import nn

import graphopt
from graphopt.ir.blocks import find_blocks
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.share import Share


@dataclass(frozen=True)
class Case:
    """A backbone, the batch its costs are of, and the batch and image size its step is timed at."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    batch: int
    timed: int


CASES = {
    "resnet32": Case(lambda: CifarResNet(32), (3, 32, 32), 128, 32),
    "resnet110": Case(lambda: CifarResNet(110), (3, 32, 32), 128, 32),
    "resnet50": Case(torchvision.models.resnet50, (3, 224, 224), 64, 4),
    "vit_s": Case(lambda: timm.create_model("vit_small_patch16_224"), (3, 224, 224), 64, 4),
}
COLUMNS = ("model", "k", "mode", "blocks", "parameters", "optimizer", "forward", "backward", "peak activations", "step time", "spread")


def stepping(module: nn.Module, x: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    module.train()
    target = torch.arange(len(x)) % 10

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), target).backward()
        optimizer.step()
        return time.process_time() - start

    return step


def rows(name: str, case: Case, every: Iterable[int], rounds: int) -> list[tuple[str, ...]]:
    torch.manual_seed(0)
    model = case.make()
    plans: dict[tuple[int, str], graphopt.Plan | str] = {}
    for k in every:
        for mode in ("mix", "surrogate"):
            try:
                plans[k, mode] = graphopt.compile(model, Share(every=k, mode=mode), input=case.input, batch=case.batch, verify="fast")
            except graphopt.GraphoptError as reason:
                plans[k, mode] = str(reason)
    x = torch.rand(case.timed, *case.input)
    made = {key: plan for key, plan in plans.items() if not isinstance(plan, str)}
    steps = {"": stepping(model, x)} | {str(key): stepping(plan.module, x) for key, plan in made.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds):
        # Who goes first changes every round: a drift of the machine's speed would favour one place in the row.
        keys = list(steps)
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            times[key].append(steps[key]())
    first = next(iter(made.values())).report.before
    assert first is not None  # the report was asked for
    base = (f"{first.parameters:,}", f"{first.optimizer_bytes / 2**20:.1f} MiB", f"{first.forward_flops / 1e9:.1f} GF")
    peak = f"{first.peak_activation_bytes / 2**20:.0f} MiB"
    seconds = f"{statistics.median(times['']):.3f} s"
    found: list[tuple[str, ...]] = [(name, "-", "end-to-end", "-", *base, f"{first.backward_flops / 1e9:.1f} GF", peak, seconds, "")]
    for (k, mode), plan in plans.items():
        if isinstance(plan, str):
            found.append((name, str(k), mode, "0", *("" for _ in range(7))))
            continue
        before, after = plan.report.before, plan.report.after
        ratios = sorted(t / b for t, b in zip(times[str((k, mode))], times[""], strict=True))
        figures = ("parameters", "optimizer_bytes", "forward_flops", "backward_flops", "peak_activation_bytes")
        shares = [f"{getattr(after, f) / getattr(before, f):.3f}" for f in figures]
        blocks = f"{len(plan.report.passes[0].regions)} of {len(find_blocks(plan.base))}"
        found.append((name, str(k), mode, blocks, *shares, f"{statistics.median(ratios):.3f}", f"{ratios[0]:.2f}-{ratios[-1]:.2f}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--every", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = heading("share: what it saves", __doc__)
    text += "\nCosts of a step at batch " + ", ".join(f"{CASES[m].batch} ({m})" for m in options.models)
    text += "; timed at batch " + ", ".join(f"{CASES[m].timed} ({m})" for m in options.models)
    text += f", {options.rounds} rounds, CPU time of one thread. Ratios to end-to-end; its own row has the figures.\n\n"
    text += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    for name in options.models:
        for row in rows(name, CASES[name], options.every, options.rounds):
            text += f"| {' | '.join(row)} |\n"
            print(" | ".join(row), flush=True)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
