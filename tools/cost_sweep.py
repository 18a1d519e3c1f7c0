"""Forecast against a real CPU step, storage by storage: every classification backbone of torchvision, one per family of timm.

    python tools/cost_sweep.py --out tools/tables/cost_sweep.md
    python tools/cost_sweep.py --only torchvision/resnet --passes

With `--passes`, each backbone also with each built-in pass (its front half frozen, and so on), where the pass applies.

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
from typing import Any

import timm
import torch
import torchvision
from machine import heading
from torch import nn

import graphopt
from graphopt.cost import CostError, forecast, measure
from graphopt.errors import GraphoptError
from graphopt.regions import parts
from graphopt.rewriting.registry import passes as installed
from graphopt.trace import trace

#: built-in passes with the options they are swept with; freeze takes the front half of the backbone's parts
PASSES: dict[str, dict[str, Any]] = {
    "freeze": {},
    "share": {"every": 2, "boundary": "nearest"},
    "supervise": {"modules": 2},
    "checkpoint": {"segments": 2},
}
#: known outliers, and why
EXPLAINED = {
    "timm/sequencer2d_s": "oneDNN's LSTM hands its workspace to the backward; only the kernel knows its size, the fake one gives none",
}
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


def with_passes() -> Iterator[tuple[str, Callable[..., tuple[nn.Module, bool]]]]:
    """The backbone's emitted module with each built-in pass; `(module, whether it takes targets)`."""

    def emitted(use: str, module: nn.Module, size: tuple[int, ...]) -> tuple[nn.Module, bool]:
        options: dict[str, Any] = dict(PASSES[use])
        if use == "freeze":
            names = [r.name for r in parts(trace(module, size, compare=False)) if r.parameters]
            options["select"] = names[: len(names) // 2]
        value = installed()[use].model_validate(options)
        plan = graphopt.compile(module, value, input=size, verify="off", costs=False)
        return plan.module, plan.needs.targets

    for use in PASSES:
        yield use, lambda module, size, use=use: emitted(use, module, size)


def row(name: str, build: Callable[[], nn.Module], limit: int, change: Any = None) -> tuple[str, bool]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = build()
            if sum(p.numel() for p in module.parameters()) > limit:
                return f"| {name} | | | | | not run: over {limit / 1e6:.0f} M parameters |", True
            size = fitting_input(module)
            targets = False
            if change:
                try:
                    module, targets = change(module, size)
                except GraphoptError as error:
                    return f"| {name} | | | | | does not apply: {str(error).splitlines()[0][:120]} |", True
            start = time.perf_counter()
            expected = forecast(module, size, 2, targets=targets)
            seconds = time.perf_counter() - start
            found = measure(module, size, 2, targets=targets)
    except CostError as error:
        return f"| {name} | | | | | no forecast: {str(error).splitlines()[0][:160]} |", False
    except Exception as error:
        traceback.print_exc()
        return f"| {name} | | | | | {type(error).__name__}: {str(error).splitlines()[0][:160]} |", False
    keys = ("saved_activation_bytes", "peak_activation_bytes", "peak_bytes", "forward_flops", "backward_flops")
    wrong = {k: (getattr(expected, k), getattr(found, k)) for k in keys if getattr(expected, k) != getattr(found, k)}
    verdict = "equal" if not wrong else "; ".join(f"{k} {a:,} forecast, {b:,} real ({a / b:.4f})" for k, (a, b) in wrong.items())
    if wrong and name in EXPLAINED:
        verdict += f". Explained: {EXPLAINED[name]}"
    image = "x".join(map(str, size))
    figures = f"{expected.parameters / 1e6:.1f} M | {expected.saved_activation_bytes / 2**20:.2f} | {expected.peak_bytes / 2**20:.2f}"
    return f"| {name} | {image} | {figures} ({seconds:.1f} s) | {verdict} |", not wrong or name in EXPLAINED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--passes", action="store_true", help="with each built-in pass, too")
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
            changes = [("", None), *(with_passes() if options.passes else ())]
            for use, change in changes:
                line, fine = row(f"{name} {use}".strip(), build, int(options.limit), change)
                total, good = total + 1, good + fine
                lines.append(line)
                print(line, flush=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    equal = sum(line.endswith("| equal |") for line in lines)
    told = sum("Explained:" in line for line in lines)
    counts = f"{equal} of {total} equal, {told} explained, {total - good} wrong, the rest not run"
    lines.append(f"\n{counts}. Largest resident size of the sweep: {rss:.1f} GiB.")
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
