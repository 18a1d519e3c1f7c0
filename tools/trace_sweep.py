"""Traces every torchvision classification backbone and one backbone of each timm model file, and prints what came of it.

    python tools/trace_sweep.py [--only NAME ...] [--seconds-per-model 60]

A row is exact when train and eval output equal the backbone's bit for bit under one seed and the state-dict keys are the backbone's; the
column "opaque" counts modules kept whole. Exit code 1 if any model is neither exact nor refused with a clear TraceError.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter

import timm
import torch
import torchvision
from timm.models._registry import _model_to_module

from graphopt import TraceError, trace
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points


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


def attempt(source: str, name: str) -> tuple[str, str]:
    torch.manual_seed(0)
    if source == "torchvision":
        model = torchvision.models.get_model(name, weights=None)
        size = (3, 299, 299) if "inception" in name else (3, 224, 224)
    else:
        model = timm.create_model(name, pretrained=False)
        size = model.default_cfg.get("input_size", (3, 224, 224)) if hasattr(model, "default_cfg") else (3, 224, 224)
    start = time.perf_counter()
    graph = trace(model, tuple(size))
    seconds = time.perf_counter() - start
    keys = list(graph.module.state_dict()) == list(model.state_dict())
    detail = f"{len(graph.nodes)} nodes, {len(cut_points(graph))} cut points, {len(find_blocks(graph))} blocks, {seconds:.1f} s"
    if not keys:
        return "KEYS DIFFER", detail
    reasons = Counter(o.reason.split(":")[0] for o in graph.opaque)
    return f"exact, {len(graph.opaque)} opaque" if graph.opaque else "exact", detail + "".join(f"; {c}x {r}" for r, c in reasons.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="names to try")
    parser.add_argument("--source", choices=["torchvision", "timm"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    total: Counter[str] = Counter()
    for source, name in candidates():
        if (options.only and name not in options.only) or (options.source and source != options.source):
            continue
        try:
            outcome, detail = attempt(source, name)
        except TraceError as error:
            outcome, detail = "refused", str(error)
        except Exception as error:  # the table is what tells
            outcome, detail = "FAILED", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        total[outcome.split(",")[0]] += 1
        print(f"{source:12} {name:44} {outcome:18} {detail}", flush=True)
    print(", ".join(f"{k} {v}" for k, v in sorted(total.items())), f"(torch {torch.__version__}, timm {timm.__version__})")
    return int(bool(total["FAILED"] or total["KEYS DIFFER"]))


if __name__ == "__main__":
    sys.exit(main())
