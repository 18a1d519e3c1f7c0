"""Traces every torchvision classification backbone and one backbone of each timm model file, each at its own size.

    python tools/trace_sweep.py [--only NAME ...] [--source timm] [--out tools/tables/trace_sweep.md]

A row is exact when train and eval output equal the backbone's bit for bit under one seed and the state-dict keys are the backbone's.
Exit code 1 if any model is neither exact nor refused with a clear TraceError.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import torchvision
from machine import heading
from timm.models._registry import _model_to_module

from graphopt import TraceError, trace
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points

HEAD = ["backbone", "input", "", "nodes", "cut points", "blocks", "modules kept whole", "seconds"]


def candidates() -> list[tuple[str, str]]:
    """(source, name): all of torchvision's, and per timm file its smallest-sounding model."""
    found = [("torchvision", n) for n in torchvision.models.list_models(module=torchvision.models)]
    small = ("nano", "atto", "femto", "pico", "tiny", "_xxs", "_xs", "_s0", "_b0", "mini", "small", "18", "_s_", "lite", "m0", "t0")
    files: dict[str, list[str]] = {}
    for name in timm.list_models():
        files.setdefault(_model_to_module[name], []).append(name)
    for names in files.values():
        found.append(("timm", min(names, key=lambda n: (not any(s in n for s in small), len(n), n))))
    return found


def attempt(source: str, name: str) -> list[str]:
    """The cells of a row from the input on."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None) if source == "torchvision" else timm.create_model(name, pretrained=False)
    declared = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    size = (3, 299, 299) if source == "torchvision" and "inception" in name else tuple(declared)
    start = time.perf_counter()
    try:
        graph = trace(model, size)
    except TraceError as error:
        return ["x".join(map(str, size)), f"refused: {error}", *[""] * 5]
    except Exception as error:  # the table is what tells
        return ["x".join(map(str, size)), f"FAILED: {type(error).__name__} {error}".splitlines()[0], *[""] * 5]
    seconds = time.perf_counter() - start
    found = "exact" if list(graph.module.state_dict()) == list(model.state_dict()) else "KEYS DIFFER"
    reasons = Counter(o.reason.split(":")[0] for o in graph.opaque)
    counts = [len(graph.nodes), len(cut_points(graph)), len(find_blocks(graph))]
    return ["x".join(map(str, size)), found, *map(str, counts), "; ".join(f"{c} {r}" for r, c in reasons.items()), f"{seconds:.1f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="names to try")
    parser.add_argument("--source", choices=["torchvision", "timm"])
    parser.add_argument("--out", type=Path, help="write the table there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    total: Counter[str] = Counter()
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for source, name in candidates():
        if (options.only and name not in options.only) or (options.source and source != options.source):
            continue
        cells = attempt(source, name)
        total[cells[1].split(":")[0]] += 1
        lines.append(f"| {' | '.join([f'{source}/{name}', *(cell.replace('|', '/') for cell in cells)])} |")
        print(lines[-1], flush=True)
    told = ", ".join(f"{count} {word}" for word, count in total.most_common())
    print(told)
    if options.out:
        title = heading("Traces of backbones at their own size", __doc__)
        options.out.write_text("\n".join([title, f"{told}. Wall times, beside other work.", "", *lines, ""]))
    return int(bool(total["FAILED"] or total["KEYS DIFFER"]))


if __name__ == "__main__":
    sys.exit(main())
