"""Forecast against a real CPU step, storage by storage: every classification backbone of torchvision, one per family of timm.

    python tools/cost_sweep.py --out tools/tables/cost_sweep.md
    python tools/cost_sweep.py --only resnet --spec freeze.toml

Both sides are the same instrument, on fake and on real tensors: equality says that the fake step allocates and frees what the real one
does. `tools/cost_rss.py` is the independent check.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torchvision
from machine import heading
from torch import nn

from graphopt.cost import CostError, forecast, measure

SIZES = (64, 96, 128, 224, 256, 299, 384)
SMALL = ("atto", "femto", "pico", "nano", "xxs", "xxt", "xs", "xt", "tiny", "mini", "micro", "_s", "small", "_t", "18", "26", "b0", "m0")


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in torchvision.models.list_models(module=torchvision.models):
        yield f"torchvision/{name}", lambda name=name: torchvision.models.get_model(name, weights=None)


def timm_families() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        small = [n for n in names if any(s in n for s in SMALL)] or names
        sizes: dict[str, int] = {}
        for name in sorted(small, key=len)[:6]:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:
                continue
        name = min(sizes, key=sizes.__getitem__) if sizes else small[0]
        yield f"timm/{name}", lambda name=name: timm.create_model(name)


def fitting_input(module: nn.Module) -> tuple[int, ...]:
    """The smallest square image the module trains on, or the one it declares."""
    declared = getattr(module, "default_cfg", {}).get("input_size")
    sizes = [(3, s, s) for s in SIZES]
    for size in [*sizes, declared] if declared else sizes:
        try:
            forecast(module, size, 2, optimizer=None)
        except CostError as error:
            last = error
        else:
            return size
    raise last


def row(name: str, build: Callable[[], nn.Module], limit: int) -> tuple[str, bool]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = build()
            if sum(p.numel() for p in module.parameters()) > limit:
                return f"| {name} | | | | | not run: over {limit / 1e6:.0f} M parameters |", True
            size = fitting_input(module)
            start = time.perf_counter()
            expected = forecast(module, size, 2)
            seconds = time.perf_counter() - start
            found = measure(module, size, 2)
    except CostError as error:
        return f"| {name} | | | | | no forecast: {str(error).splitlines()[0][:160]} |", False
    except Exception as error:
        traceback.print_exc()
        return f"| {name} | | | | | {type(error).__name__}: {str(error).splitlines()[0][:160]} |", False
    keys = ("saved_activation_bytes", "peak_activation_bytes", "peak_bytes", "forward_flops", "backward_flops")
    wrong = {k: (getattr(expected, k), getattr(found, k)) for k in keys if getattr(expected, k) != getattr(found, k)}
    verdict = "equal" if not wrong else "; ".join(f"{k} {a:,} forecast, {b:,} real ({a / b:.4f})" for k, (a, b) in wrong.items())
    image = "x".join(map(str, size))
    figures = f"{expected.parameters / 1e6:.1f} M | {expected.saved_activation_bytes / 2**20:.2f} | {expected.peak_bytes / 2**20:.2f}"
    return f"| {name} | {image} | {figures} ({seconds:.1f} s) | {verdict} |", not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--limit", type=float, default=350e6, help="parameters; a larger model's real step does not fit here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("Forecast against a real CPU step: live bytes, batch 2, SGD with momentum", __doc__)]
    lines += ["| backbone | input | parameters | saved, MiB | peak, MiB (forecast took) | against the real step |"]
    lines += ["|---|---|---|---|---|---|"]
    good = total = 0
    for family in (torchvision_models, timm_families):
        for name, build in family():
            if options.only not in name:
                continue
            line, fine = row(name, build, int(options.limit))
            total, good = total + 1, good + fine
            lines.append(line)
            print(line, flush=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines.append(f"\n{good} of {total} as they should be. Largest resident size of the sweep: {rss:.1f} GiB.")
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
