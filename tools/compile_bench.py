"""Eager against compiled: seconds of processor time of a training step per pass, in turns in one process.

    python tools/compile_bench.py [--depth 20] [--batch 32] [--rounds 15] [--out tools/tables/compile.md]

A CIFAR ResNet at 32 pixels, one thread, torch.compile with its default backend. "Graphs" are those compiled in the first steps, and
"again" those compiled in the rounds that are measured. "Whole" says whether the network is one graph (fullgraph=True); local modules and
branches that a step leaves out at random are graphs of their own. "Difference" is the largest of any gradient after one step, over the
largest gradient in eager mode; float32 rounds at 1e-7. A ReLU whose input rounds to the other side of zero passes its gradient on or not:
with GELU in the place of ReLU, the network without passes differs by 5e-6, not by 3e-3 (batch 16).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import heading
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import graphopt
from graphopt import Pass
from graphopt.ir.inputs import samples
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.adapt import Adapt
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.ghost_norm import GhostNorm
from graphopt.passes.resize import Resize
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.runtime.randomness import set_seeds

SHAPE = (3, 32, 32)
CASES: dict[str, Sequence[Pass]] = {
    "no pass": (),
    "freeze, layer1": (Freeze(select=["conv1", "bn1", "layer1"]),),
    "freeze, layer1 behind a trainable stem": (Freeze(select="layer1"),),
    "share, mix": (Share(every=2),),
    "share, surrogate": (Share(every=2, mode="surrogate"),),
    "drop, up to layer1": (Drop(upto="layer1", cache="none"),),
    "drop, bypass at random": (Drop(mode="bypass", probability=0.5),),
    "supervise, 3 modules": (Supervise(modules=3),),
    "checkpoint, layer2": (Checkpoint(select="layer2"),),
    "adapt, rank 4": (Adapt(rank=4),),
    "blurpool": (BlurPool(),),
    "factorize": (Factorize(),),
    "ghost_norm, 4 samples": (GhostNorm(samples=4),),
    "resize, 24 px": (Resize(size=24),),
}
#: steps before the first that is measured: enough for each random branch to have run
WARM = 8


class Variant:
    """A network and its training step, without the optimizer."""

    def __init__(self, module: nn.Module, targets: bool, *, compiled: bool) -> None:
        self.module, self.targets = module.train(), targets
        self.call: Callable[..., Any] = torch.compile(module) if compiled else module

    def step(self, number: int, x: Tensor, y: Tensor) -> None:
        self.module.zero_grad(set_to_none=True)
        set_seeds(lambda: number, number)
        output = self.call(x, y) if self.targets else self.call(x)
        output, local = output if self.targets else (output, 0.0)
        (F.cross_entropy(output, y) + local).backward()


def measured(name: str, depth: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    plan = graphopt.compile(CifarResNet(depth), CASES[name], input=SHAPE, verify="off", costs=False)
    (x,), y = samples(plan.graph.input, batch, torch.randn), torch.arange(batch) % 10
    variants = [Variant(deepcopy(plan.module), plan.needs.targets, compiled=compiled) for compiled in (False, True)]
    counters.clear()
    began = time.process_time()
    difference = 0.0
    for number in range(WARM):
        for variant in variants:
            variant.step(number, x, y)
        difference = difference or _difference(*(variant.module for variant in variants))
    compiling, graphs = time.process_time() - began, counters["stats"]["unique_graphs"]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for variant, found in zip(variants, seconds, strict=True):
            began = time.process_time()
            variant.step(number, x, y)
            found.append(time.process_time() - began)
    set_seeds(None, None)
    ratios = [compiled / eager for eager, compiled in zip(*seconds, strict=True)]
    again = counters["stats"]["unique_graphs"] - graphs
    eager = statistics.median(seconds[0])
    return {"ratios": ratios, "eager": eager, "graphs": graphs, "again": again, "difference": difference, "compiling": compiling}


def whole(name: str, depth: int, batch: int) -> bool:
    """Whether a forward with gradients is one graph; nothing is generated for it."""
    torch.compiler.reset()
    plan = graphopt.compile(CifarResNet(depth), CASES[name], input=SHAPE, verify="off", costs=False)
    (x,), y = samples(plan.graph.input, batch, torch.randn), torch.arange(batch) % 10
    compiled = torch.compile(plan.module.train(), backend="eager", fullgraph=True)
    try:
        compiled(x, y) if plan.needs.targets else compiled(x)
    except Unsupported:
        return False
    return True


def _difference(eager: nn.Module, compiled: nn.Module) -> float:
    pairs = [(a.grad, b.grad) for a, b in zip(eager.parameters(), compiled.parameters(), strict=True) if a.grad is not None]
    return max(float((a - b).abs().max()) for a, b in pairs if b is not None) / max(float(a.abs().max()) for a, _ in pairs)


def ratio(depth: int = 8, batch: int = 16, rounds: int = 7) -> float:
    """Compiled over eager, of a step of a network without passes: the median over rounds."""
    return statistics.median(measured("no pass", depth, batch, rounds)["ratios"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "",
        "eager step, s",
        "compiled / eager: quartiles",
        "whole",
        "graphs",
        "again",
        "difference",
        f"first {WARM} steps of both, s",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in options.cases:
        found = measured(name, options.depth, options.batch, options.rounds)
        quartiles = " / ".join(f"{value:.2f}" for value in statistics.quantiles(found["ratios"], n=4, method="inclusive"))
        one = "yes" if whole(name, options.depth, options.batch) else "no"
        cells = [name, f"{found['eager']:.3f}", quartiles, one, found["graphs"], found["again"], f"{found['difference']:.0e}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{found['compiling']:.0f}"])) + " |")
        print(lines[-1], flush=True)
    text = "\n".join([heading("Eager against compiled", __doc__), *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
