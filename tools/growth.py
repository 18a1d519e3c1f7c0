"""Time of the compiler against the number of nodes: what is linear takes the same time a node in every row of a graph's kind.

    python tools/growth.py --out tools/tables/growth.md

Processor seconds, without comparing outputs and without costs: trace; emission alone; for each pass what it decides, a copy of the graph,
the rewrite and the emission of that (`resize` traces the backbone again first); a diff, and the data of its page; the layout of the page at
each level of detail, in V8; and the choice of 8 parts in 500 pieces. The graphs are chains of residual blocks, dense blocks (each of 24
layers reads all before it) and wide ones (32 branches side by side). The last column is the time a node of the largest graph over that of
the smallest: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
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
from graphopt import Pass
from graphopt.compiler.emit import emit
from graphopt.compiler.pass_base import PassInstance
from graphopt.compiler.pipeline import match_all
from graphopt.compiler.plan import compile_phase
from graphopt.compiler.registry import passes
from graphopt.cost.partition import best
from graphopt.diff import Diff
from graphopt.diff.render.data import page_data
from graphopt.diff.render.page import SCRIPTS, web
from graphopt.driver import prepare
from graphopt.errors import GraphoptError

SIZES = (1_000, 4_000, 20_000)
#: levels of detail of a diff's page
LEVELS = ("folded", "blocks", "operations")
WIDTH, SHAPE = 4, (3, 16, 16)


def conv(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Ten nodes; what blurpool blurs is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()
        self.pool, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.enlarge(self.pool(self.second(self.first(x)))))


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
KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {"chain": (Residual, 10), "dense": (Dense, 98), "wide": (Wide, 99)}


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


def passes_of(blocks: int) -> dict[str, Pass]:
    """Each pass, as it acts on much of a network of so many blocks."""
    tables: dict[str, dict[str, Any]] = {
        "freeze": {"select": [{"blocks": True, "first": 0.5}]},
        "checkpoint": {"select": [{"blocks": True}]},
        "drop, prefix": {"upto": f"blocks.{blocks // 2}", "cache": "none"},
        "drop, bypass": {"mode": "bypass", "probability": 0.2},
        "share, mix": {"mode": "mix"},
        "share, surrogate": {"mode": "surrogate"},
        "supervise": {"modules": 4},
        "adapt": {"rank": 1},
        "blurpool": {},
        "factorize": {},
        "ghost_norm": {},
        "resize": {"size": SHAPE[1] // 2},
    }
    return {name: passes()[name.partition(",")[0]].model_validate(table) for name, table in tables.items()}


def layouts(data: dict[str, Any]) -> dict[str, float]:
    """Seconds that V8 takes to lay out the page of a diff at each level of detail; nothing without the mini-racer package."""
    with suppress(ImportError):
        from py_mini_racer import MiniRacer

        found, state = (
            {},
            "open: new Set(), closed: new Set(), labelled: [], columns: 0, uniform: false, nodes: (row) => data.pool[row.nodes]",
        )
        for level in LEVELS:
            engine = MiniRacer()  # each remembers the blocks that it has laid out
            engine.eval("\n".join([*map(web, SCRIPTS), f"const data = JSON.parse({json.dumps(json.dumps(data))});"]))
            call = f"graphoptLayout.arrange(data.phases[0], {{level: '{level}', metric: data.metric, {state}}}, 1200, 760).width"
            found[f"layout, {level}"] = timed(partial(engine.eval, call, timeout_sec=600))[0]
            engine.close()
        return found
    return {}


def measure(kind: str, size: int) -> tuple[int, dict[str, float]]:
    """Nodes of a graph, and seconds by step; a pass that refuses the graph has none."""
    block, nodes = KINDS[kind]
    blocks = max(2, size // nodes)
    found: dict[str, float] = {}
    found["trace"], source = timed(lambda: prepare(Network(block, blocks), [], input=SHAPE, compare=False))
    found["emit"], _ = timed(lambda: emit(source.base))
    plans: dict[str, graphopt.Plan] = {}
    for name, value in passes_of(blocks).items():

        def compiled(value: Pass = value) -> graphopt.Plan:
            matched = match_all(source.base, [PassInstance(value, 0)])
            return compile_phase(replace(source, matched=matched, sizes=source.sizes.with_passes(matched)), verify="off", costs=False)

        with suppress(GraphoptError):
            found[name], plans["last"] = timed(compiled)
            if name == "freeze":
                found["diff"], diff = timed(partial(Diff.of, plans["last"]))
                found["page's data"], data = timed(partial(page_data, diff))
                found |= layouts(data)
    return len(source.base.nodes), found


def table(kind: str, sizes: Sequence[int]) -> Iterator[str]:
    """Lines of one kind of graphs: seconds by step and number of nodes."""
    rows = [measure(kind, size) for size in sizes]
    yield f"\n| {kind} | {' | '.join(f'{nodes:,} nodes' for nodes, _ in rows)} | a node |"
    yield "|---" * (len(rows) + 2) + "|"
    (fewest, first), (most, last) = rows[0], rows[-1]
    for step in dict.fromkeys(step for _, found in rows for step in found):
        before, after = first.get(step), last.get(step)
        growth = f"x{after / before / (most / fewest):.2f}" if before and after else "-"
        seconds = (f"{found[step]:.2f}" if step in found else "-" for _, found in rows)
        yield f"| {step} | {' | '.join(seconds)} | {growth} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure("chain", 100)  # imports and first use
    lines = [heading("Growth with the number of nodes", __doc__)]
    for kind in options.kinds:
        for line in table(kind, options.sizes):
            lines.append(line)
            print(line, flush=True)
    lines.append(f"\nThe choice of 8 parts in 500 pieces: {balance():.2f} s.")
    print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
