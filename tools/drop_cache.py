"""Reading kept features against computing them, at every point where a prefix may be dropped.

    nice python tools/drop_cache.py --out tools/tables/drop_cache.md

Per sample: the prefix under no_grad on batches as training has them (images already in memory, which favours computing), and rows by a
shuffled index from RAM and from a memory-mapped file. Processor time, one thread, so that a busy machine does not show. The file's pages
are in the cache of the system, as in a run that has just filled it: a disk that must be read for real is not in these figures, and the
runner measures by the clock. Where its ratio is over 1 the runner declines.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import heading

from graphopt import trace
from graphopt.compiler.emit import emit
from graphopt.driver import build_backbone as build
from graphopt.ir.blocks import find_blocks
from graphopt.planning.run_cost import drop_points
from graphopt.spec import BackboneSpec
from graphopt.train.feature_cache.store import CacheDirectory, EntryLayout, Fill, MemoryFill
from graphopt.units import show_size

BACKBONES = {
    "cifar/resnet32 at 32 px": BackboneSpec(source="cifar", name="resnet32", input=(3, 32, 32)),
    "cifar/vgg11 at 32 px": BackboneSpec(source="cifar", name="vgg11", input=(3, 32, 32)),
}


def timed(function: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` calls, in seconds of processor time."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        best = min(best, time.process_time() - began)
    return best


def reading(fill: Fill, layout: EntryLayout) -> float:
    """Seconds to read every row once, in shuffled batches."""
    order = torch.randperm(layout.rows).split(layout.chunk)
    return timed(lambda: [fill.read(part) for part in order], 3)


def table(spec: BackboneSpec, batch: int, rows: int, repeats: int, every: int) -> list[str]:
    """One line per drop point."""
    graph = trace(build(spec), spec.input, compare=False)
    graph.module.eval()
    x = torch.rand(batch, *spec.input)
    ends = {block.name: block.exits[-1] for block in find_blocks(graph)}
    lines = []
    for point in drop_points(graph)[::every]:
        prefix = emit(graph, stop=ends[point.name])
        with torch.no_grad():
            computing = timed(partial(prefix, x), repeats) / batch
        for dtype in (torch.float32, torch.float16):
            layout = EntryLayout("k" * 8, rows, point.shape, dtype, batch)
            seconds = {}
            memory = MemoryFill(layout)
            with tempfile.TemporaryDirectory() as folder, CacheDirectory(Path(folder) / "cache", "tool").filling(layout) as file:
                assert isinstance(file, Fill)  # the folder was empty
                for fill, name in ((memory, "RAM"), (file, "file")):
                    for number in range(layout.chunks):
                        first, end = layout.span(number)
                        fill.write(number, torch.rand(end - first, *point.shape).to(dtype), torch.zeros(end - first, dtype=torch.int64))
                    seconds[name] = reading(fill, layout) / rows
            cells = (
                point.name,
                str(dtype).removeprefix("torch."),
                show_size(layout.row_bytes),
                f"{1e6 * computing:.0f}",
                *(f"{1e6 * seconds[name]:.1f}" for name in seconds),
                *(f"{seconds[name] / computing:.3f}" for name in seconds),
            )
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", type=int, default=3, help="of the drop points of a deep network, each so many-th")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("drop after", "dtype", "a sample", "computing, us", "RAM, us", "file, us", "RAM / computing", "file / computing")
    lines = [heading("drop: reading kept features against computing them", __doc__)]
    for name, spec in BACKBONES.items():
        lines += [f"\n## {name}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += table(spec, options.batch, options.rows, options.repeats, options.every if "resnet" in name else 1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
