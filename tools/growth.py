"""Time of the compiler against the number of nodes: what is linear takes the same time a node in every row of a graph's kind.

    python tools/growth.py --out tools/tables/growth.md

Processor seconds, without comparing outputs and without costs: trace; emission alone; for each pass what it decides, a copy of the graph,
the rewrite and the emission of that; a diff's data; and the choice of 8 parts in 500 pieces. The graphs are chains of
residual blocks, dense blocks (every layer reads all before it, 24 in a block) and wide ones (32 branches side by side). `a node` is the
time of the largest graph of a kind a node, over that of its smallest: 1.0 is linear, and the number of nodes has grown by `nodes`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import heading
from torch import Tensor, nn

import graphopt
from graphopt.compiler.emit import emit
from graphopt.compiler.pass_base import PassInstance
from graphopt.compiler.pipeline import match_all
from graphopt.compiler.plan import compile_phase
from graphopt.compiler.registry import passes
from graphopt.cost.partition import best
from graphopt.diff import Diff
from graphopt.driver import prepare
from graphopt.errors import GraphoptError

SIZES = (1_000, 4_000)
#: each pass, as it acts on much of a graph
PASSES: dict[str, dict[str, Any]] = {
    "freeze": {"select": [{"blocks": True, "first": 0.5}]},
    "checkpoint": {"select": [{"blocks": True}]},
    "drop": {"mode": "bypass", "probability": 0.2},
    "share": {"mode": "mix"},
    "supervise": {"modules": 4},
    "adapt": {"rank": 1},
    "blurpool": {},
    "factorize": {},
    "ghost_norm": {},
}
WIDTH, SHAPE = 4, (3, 16, 16)


def conv(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Eight nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class Dense(nn.Module):
    """Every layer reads what all before it gave: 24 times four nodes, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(WIDTH * (i + 1)) for i in range(24))
        self.project = nn.Conv2d(WIDTH * 25, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.project(torch.cat(found, 1))


class Wide(nn.Module):
    """32 branches of three nodes, side by side, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv() for _ in range(32))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([branch(x) for branch in self.branches]).sum(0)


#: kinds of graphs: their blocks, and how many nodes each has
KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {"chain": (Residual, 8), "dense": (Dense, 98), "wide": (Wide, 99)}


class Network(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(block() for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def balance(pieces: int = 500, parts: int = 8) -> float:
    """Seconds to choose the cuts between so many pieces; the table of their peaks is not counted."""
    start, end = np.indices((pieces, pieces))
    table = np.where(end >= start, end - start + 1.0, np.inf)
    return timed(lambda: best(table, parts))[0]


def measure(kind: str, size: int) -> tuple[int, dict[str, float]]:
    """Nodes of a graph, and seconds by step; a pass that refuses the graph has none."""
    block, nodes = KINDS[kind]
    model = Network(block, max(2, size // nodes))
    found: dict[str, float] = {}
    found["trace"], source = timed(lambda: prepare(model, [], input=SHAPE, compare=False))
    found["emit"], _ = timed(lambda: emit(source.base))
    for name, options in PASSES.items():
        value = passes()[name](**options)

        def compiled(value: graphopt.Pass = value) -> graphopt.Plan:
            matched = match_all(source.base, [PassInstance(value, 0)])
            return compile_phase(replace(source, matched=matched, sizes=source.sizes.with_passes(matched)), verify="off", costs=False)

        with suppress(GraphoptError):
            found[name], plan = timed(compiled)
            if name == "freeze":
                found["diff"], _ = timed(partial(Diff.of, plan))
    return len(source.base.nodes), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure("chain", 100)  # imports and first use
    columns = ["trace", "emit", *PASSES, "diff"]
    lines = [heading("Growth with the number of nodes", __doc__)]
    lines += [f"| graph | nodes | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    print("\n".join(lines[1:]), flush=True)
    for kind in options.kinds:
        rows = [measure(kind, size) for size in options.sizes]
        texts = [(f"{nodes:,}", [found.get(c) for c in columns], "{:.2f}") for nodes, found in rows]
        (fewest, first), (most, last) = rows[0], rows[-1]
        growth = [b / a / (most / fewest) if (a := first.get(c)) and (b := last.get(c)) else None for c in columns]
        texts.append((f"x{most / fewest:.0f}", growth, "x{:.1f} a node"))
        for nodes, values, form in texts:
            lines.append(f"| {kind} | {nodes} | {' | '.join('-' if v is None else form.format(v) for v in values)} |")
            print(lines[-1], flush=True)
    lines.append(f"\nThe choice of 8 parts in 500 pieces: {balance():.2f} s.")
    print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
