"""Time of a forecast against the number of graph nodes: linear, from 100 to 20,000.

    python tools/cost_scaling.py --out tools/tables/cost_scaling.md

Chains of linear layer, norm and activation, as graph modules; the time per node should stay the same. Also the two backbones whose
forecast at batch 256 has to stay under five seconds. Processor time, so that a busy machine does not show.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torchvision
from machine import heading
from torch import fx, nn

from graphopt.cost import forecast

NODES = (100, 300, 1_000, 3_000, 10_000, 20_000)


def chain(nodes: int) -> fx.GraphModule:
    """A graph module of about `nodes` nodes, on the meta device."""
    with torch.device("meta"):
        parts = [m for _ in range((nodes - 2) // 3) for m in (nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())]
        return fx.symbolic_trace(nn.Sequential(*parts))


def seconds(module: nn.Module, shape: tuple[int, ...], batch: int) -> float:
    start = time.process_time()
    forecast(module, shape, batch)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds(chain(100), (8,), 4)  # imports and first use
    lines = [heading("Time of a forecast", __doc__), "| graph | nodes | processor seconds | ms a node |", "|---|---|---|---|"]
    for nodes in NODES:
        module = chain(nodes)
        count = len(module.graph.nodes)
        took = seconds(module, (8,), 4)
        lines.append(f"| chain | {count:,} | {took:.2f} | {1000 * took / count:.2f} |")
        print(lines[-1], flush=True)
    for name in ("resnet152", "swin_t"):
        with torch.device("meta"):
            module = getattr(torchvision.models, name)()
        took = seconds(module, (3, 224, 224), 256)
        lines.append(f"| {name}, batch 256, 224 px | | {took:.2f} | |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
