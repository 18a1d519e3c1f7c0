"""How far a forecast of time is off: one training step of several backbones, plain and with passes, as forecast and as timed.

    python tools/cost_time.py [--batch 4] [--rounds 5] [--out FILE]

Rates are measured here first, on six other networks (`graphopt.cost.measure_rates`). "Ratio" is the forecast over the median of the timed
steps (forward, backward, SGD); with one thread, processor time, otherwise wall time. "Saved" is what the pass saves of the backbone's step,
forecast and timed in turns. The rates know nothing of a kernel's own efficiency: depthwise convolutions (EfficientNet) take longer than
they say, and what fits into the caches is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from machine import heading
from on_graph import plan_on
from torch import nn

from graphopt import trace
from graphopt.compiler.pass_base import Pass
from graphopt.cost import forecast, measure_rates
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise

BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, Pass]]] = {
    "cifar resnet110": (
        lambda: cifar.build("resnet110"),
        32,
        {
            "freeze layer1": Freeze(select=("conv1", "bn1", "layer1")),
            "surrogate, every 4": Share(mode="surrogate", every=4),
            "supervise, 4 modules": Supervise(modules=4, balance="memory"),
            "checkpoint, 8 segments": Checkpoint(segments=8),
        },
    ),
    "timm vit_tiny, 6 blocks": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6),
        32,
        {"supervise, 2 modules": Supervise(modules=2, balance="memory")},
    ),
    "timm swin_tiny, 3 stages of width 48": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=48, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        56,
        {"supervise, 3 modules": Supervise(balance="stage")},
    ),
    "torchvision resnet50": (
        torchvision.models.resnet50,
        224,
        {"freeze to layer2": Freeze(select=("conv1", "bn1", "layer1", "layer2")), "checkpoint, 8 segments": Checkpoint(segments=8)},
    ),
    "timm swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        224,
        {"supervise, 4 modules": Supervise(modules=4, balance="memory"), "checkpoint, 8 segments": Checkpoint(segments=8)},
    ),
    "timm vit_small": (lambda: timm.create_model("vit_small_patch16_224"), 224, {"checkpoint, 6 segments": Checkpoint(segments=6)}),
    "timm convnext_nano": (lambda: timm.create_model("convnext_nano"), 224, {}),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 224, {}),
    "torchvision vgg11_bn": (torchvision.models.vgg11_bn, 64, {}),
    "torchvision densenet121": (torchvision.models.densenet121, 128, {}),
}


def stepper(module: nn.Module, targets: bool, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-3, momentum=0.9)

    def step() -> float:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        optimizer.zero_grad()
        output, local = module(x, y) if targets else (module(x), 0.0)
        (F.cross_entropy(output, y) + local).backward()
        optimizer.step()
        return clock() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="backbones whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    rates = measure_rates()
    lines = ["| backbone | pass | forecast, s | timed, s | ratio | saved, forecast | saved, timed |", "|" + " --- |" * 7]
    for name, (make, size, passes) in BACKBONES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        backbone = make()
        graph = trace(backbone, (3, size, size), compare=False)
        x, y = torch.randn(options.batch, 3, size, size), torch.zeros(options.batch, dtype=torch.long)
        expected: dict[str, float] = {}
        steps: dict[str, Callable[[], float]] = {}
        for label, values in {"": (), **{k: (v,) for k, v in passes.items()}}.items():
            plan = plan_on(backbone, graph, values, name=name, batch=options.batch)
            expected[label] = rates.seconds(forecast(plan.module, graph.input, options.batch, targets=plan.needs.targets))
            steps[label] = stepper(plan.module, plan.needs.targets, x, y)
        taken: dict[str, list[float]] = {label: [] for label in steps}
        for number in range(options.rounds + 1):
            for label, step in steps.items():
                seconds = step()
                if number:  # the first round warms up
                    taken[label].append(seconds)
        for label in steps:
            timed = statistics.median(taken[label])
            row: list[Any] = [name, label, f"{expected[label]:.3f}", f"{timed:.3f}", f"{expected[label] / timed:.2f}"]
            if label:
                paired = statistics.median(a / b for a, b in zip(taken[label], taken[""], strict=True))
                row += [f"{1 - expected[label] / expected['']:+.1%}", f"{1 - paired:+.1%}"]
            else:
                row += ["", ""]
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    note = f"Batch {options.batch}, threads: {torch.get_num_threads()}. Measured: {1e-9 / rates.flop if rates.flop else 0:.0f} GFLOP/s in "
    note += f"convolutions, {1e-9 / rates.product if rates.product else 0:.0f} in matrix products, "
    note += f"{1e-9 / rates.byte if rates.byte else 0:.1f} GB/s, {1e6 * rates.kernel:.1f} us a call; these are off by {rates.error:.0%} at "
    note += "most on the networks they come from."
    text = heading("Forecast of time against timed steps", __doc__) + f"\n{note}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
