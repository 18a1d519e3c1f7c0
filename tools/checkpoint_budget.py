"""`checkpoint` with a budget on 30 timm networks: the peak of activations and the FLOPs that forecasts find, and gradients of real steps.

    python tools/checkpoint_budget.py --out tools/tables/checkpoint_budget.md

A step is compared bit by bit with the plain one, dropout and drop-path on. Budgets below the lowest possible one are shown as "-".
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import timm
import torch
from machine import heading
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.compiler.pass_base import PassInstance
from graphopt.compiler.pipeline import match_all, rewrite
from graphopt.cost import Cost, forecast
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.passes.checkpoint import Checkpoint

BUDGETS = (0.8, 0.6, 0.5, 0.4, 0.3)
#: (name, input size): every family once, small ones
NETWORKS = (
    ("resnet18", 64), ("resnet50", 64), ("resnext50_32x4d", 64), ("seresnet50", 64), ("wide_resnet50_2", 64), ("res2net50_26w_4s", 64),
    ("densenet121", 64), ("vgg11_bn", 64), ("regnetx_008", 64), ("regnety_008", 64), ("efficientnet_b0", 64), ("efficientnetv2_rw_t", 64),
    ("mobilenetv2_100", 64), ("mobilenetv3_small_100", 64), ("mnasnet_100", 64), ("ghostnet_100", 64), ("repvgg_a0", 64),
    ("convnext_atto", 64), ("convnextv2_atto", 64), ("mixer_s32_224", 224), ("resmlp_12_224", 224), ("vit_tiny_patch16_224", 224),
    ("deit_tiny_patch16_224", 224), ("swin_tiny_patch4_window7_224", 224), ("poolformer_s12", 64), ("pvt_v2_b0", 64),
    ("edgenext_xx_small", 64), ("inception_next_atto", 64), ("fastvit_t8", 64), ("hardcorenas_a", 64),
)  # fmt: skip


def build(name: str) -> nn.Module:
    """The network with all its random masks on, where it has them."""
    masks: tuple[dict[str, Any], ...] = ({"drop_rate": 0.2, "drop_path_rate": 0.2}, {"drop_rate": 0.2}, {})
    for options in masks:
        try:
            return timm.create_model(name, num_classes=10, **options)
        except TypeError:
            continue
    raise ValueError(name)


def gradients(module: nn.Module, size: int) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, size, size), torch.arange(2)
    F.cross_entropy(module.train()(x), y).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all((one[k] is None and other[k] is None) or torch.equal(one[k], other[k]) for k in one)


def step(graph: Graph, passes: list[Checkpoint], size: int) -> tuple[Cost, dict[str, torch.Tensor | None]]:
    matched = match_all(graph, [PassInstance(each, 0) for each in passes])
    module = rewrite(graph, matched, (), verify="off", measure=None).module
    return forecast(module, (3, size, size), 8, optimizer=None), gradients(module, size)


def row(name: str, size: int) -> tuple[str, bool]:
    torch.manual_seed(0)
    graph = graphopt.trace(build(name), (3, size, size))
    plain, expected = step(graph, [], size)
    cells, peaks, same = [], [1.0], True
    for budget in BUDGETS:
        try:
            cost, found = step(graph, [Checkpoint(budget=budget)], size)
        except PassError as error:
            if "no choice of blocks" not in error.what:
                raise
            cells.append("-")
            continue
        peaks.append(cost.peak_activation_bytes / plain.peak_activation_bytes)
        cells.append(f"{peaks[-1]:.2f} at {cost.flops / plain.flops:.2f}")
        same &= equal(expected, found)
    monotone = all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(peaks))
    verdict = f"{'yes' if same else 'NO'} | {'yes' if monotone else 'NO'}"
    return f"| {name} | {' | '.join(cells)} | {verdict} |", same and monotone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("Peak of activations and FLOPs of a step, as shares of the plain one's, by budget", __doc__)]
    lines += [f"| network | {' | '.join(map(str, BUDGETS))} | gradients bit-equal | peak monotone |", "|---" * (len(BUDGETS) + 3) + "|"]
    good = 0
    for name, size in NETWORKS:
        text, fine = row(name, size)
        good += fine
        lines.append(text)
        print(text, flush=True)
        if options.out:
            options.out.write_text("\n".join([*lines, f"\nBoth hold on {good} of {len(lines) - 3} networks.", ""]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
