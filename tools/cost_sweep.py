"""Forecast against a real CPU step, storage by storage: every classification backbone of torchvision, one per family of timm.

    python tools/cost_sweep.py --out tools/tables/cost_sweep.md
    python tools/cost_sweep.py --only torchvision/resnet --passes drop supervise

Each backbone as it is, and with each built-in pass on about half of it, where the pass applies. Both sides are the same instrument, on fake
and on real tensors: equality says that the fake step allocates and frees what the real one does. `tools/cost_rss.py` is the
independent check.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from machine import heading
from on_graph import plan_on
from torch import nn

from graphopt import trace
from graphopt.compiler.registry import passes as installed
from graphopt.cost import Cost, CostError, forecast, measure
from graphopt.errors import GraphoptError
from graphopt.ir.blocks import disjoint_parts
from graphopt.ir.graph import Graph
from graphopt.planning.run_cost import drop_points

PASSES = ("freeze", "share", "drop", "supervise", "checkpoint")
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


def options_on_half(use: str, graph: Graph) -> dict[str, Any]:
    """Options that make a built-in pass change about half of the backbone."""
    names = [r.name for r in disjoint_parts(graph) if r.parameters]
    ends = [point.name for point in drop_points(graph)]
    return {
        "freeze": {"select": names[: max(1, len(names) // 2)]},
        "share": {"every": 2, "boundary": "nearest"},
        "drop": {"upto": ends[(len(ends) - 1) // 2] if ends else names[0]},
        "supervise": {"modules": 2},
        "checkpoint": {"segments": 2},
    }[use]


def compared(module: nn.Module, size: tuple[int, ...], targets: bool = False) -> tuple[Cost, str]:
    """The forecast, and "equal" or what is not."""
    expected, found = forecast(module, size, 2, targets=targets), measure(module, size, 2, targets=targets)
    keys = ("saved_activation_bytes", "peak_activation_bytes", "peak_bytes", "forward_flops", "backward_flops")
    wrong = {k: (getattr(expected, k), getattr(found, k)) for k in keys if getattr(expected, k) != getattr(found, k)}
    return expected, "; ".join(f"{k} {a:,} forecast, {b:,} real ({a / b:.4f})" for k, (a, b) in wrong.items()) or "equal"


class Sweep:
    """The rows so far, and what is to be said of single cells below the table."""

    def __init__(self, passes: Sequence[str], limit: float) -> None:
        self.passes, self.limit = tuple(passes), limit
        self.rows: list[str] = []
        self.notes: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, name: str, build: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        start = time.perf_counter()
        size, figures = "", " | | "
        cells = ["" for _ in self.passes]
        try:
            module = build()
            if sum(p.numel() for p in module.parameters()) > self.limit:
                plain = self._cell(name, "not run", f"over {self.limit / 1e6:.0f} M parameters")
            else:
                input = fitting_input(module)
                cost, verdict = compared(module, input)
                size = "x".join(map(str, input))
                figures = f"{cost.parameters / 1e6:.1f} | {cost.saved_activation_bytes / 2**20:.2f} | {cost.peak_bytes / 2**20:.2f}"
                plain = self._judged(name, name, verdict)
                cells = self._with_passes(name, module, input) if self.passes else []
        except Exception as error:
            traceback.print_exc()
            plain = self._cell(name, "failed", f"{type(error).__name__}: {first_line(error)}")
        self.rows.append("| " + " | ".join([name, size, figures, plain, *cells]) + " |")
        print(f"{self.rows[-1]} {time.perf_counter() - start:.0f} s", flush=True)

    def _with_passes(self, name: str, module: nn.Module, size: tuple[int, ...]) -> list[str]:
        try:
            graph = trace(module, size, compare=False)
        except GraphoptError as error:
            return [self._cell(f"{name} {use}", "no", first_line(error)) for use in self.passes]
        return [self._with_pass(f"{name} {use}", use, module, graph) for use in self.passes]

    def _with_pass(self, name: str, use: str, module: nn.Module, graph: Graph) -> str:
        try:
            value = installed()[use].model_validate(options_on_half(use, graph))
            plan = plan_on(module, graph, (value,), name=name)
            return self._judged(name, name.split()[0], compared(plan.module, graph.input, plan.needs.targets)[1])
        except CostError as error:
            return self._cell(name, "failed", f"no forecast: {first_line(error)}")
        except GraphoptError as error:
            return self._cell(name, "no", first_line(error))
        except Exception as error:
            traceback.print_exc()
            return self._cell(name, "failed", f"{type(error).__name__}: {first_line(error)}")

    def _judged(self, name: str, backbone: str, verdict: str) -> str:
        if verdict == "equal":
            return self._cell(name, "equal")
        if backbone in EXPLAINED:
            return self._cell(name, "explained", f"{verdict}. {EXPLAINED[backbone]}")
        return self._cell(name, "wrong", verdict)

    def _cell(self, name: str, word: str, why: str = "") -> str:
        self.counts[word] += 1
        if why:
            self.notes.setdefault(f"{word}: {why}", []).append(name)
        return word

    @property
    def good(self) -> bool:
        return not self.counts["wrong"] and not self.counts["failed"]

    def text(self) -> str:
        head = ["backbone", "input", "parameters, M", "saved, MiB", "peak, MiB", "as it is", *self.passes]
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        counts = ", ".join(f"{n} {word}" for word, n in self.counts.most_common())
        return "\n".join(
            [
                heading("Forecast against a real CPU step: live bytes and FLOPs, batch 2, SGD with momentum", __doc__),
                "equal: saved and peak bytes and FLOPs are the same numbers. no: the pass does not apply, the reason is below. Parameters,",
                f"saved and peak are the backbone's as it is.\n\n{counts}. Largest resident size of the sweep: {rss:.1f} GiB.\n",
                "| " + " | ".join(head) + " |",
                "|" + " --- |" * len(head),
                *self.rows,
                "",
                *(f"- {why} ({len(names)}: {', '.join(names)})" for why, names in sorted(self.notes.items())),
                "",
            ]
        )


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160].replace("|", "/") if str(error) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=PASSES, help="none: the backbones as they are")
    parser.add_argument("--limit", type=float, default=350e6, help="parameters; a larger model's real step does not fit here")
    parser.add_argument("--out", type=Path, help="write the table there, after every backbone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sweep = Sweep(options.passes, options.limit)
    for family in (torchvision_models, timm_families):
        for name, build in family():
            if options.only in name:
                sweep.add(name, build)
                if options.out:
                    options.out.write_text(sweep.text())
    print(sweep.text().partition("\n\n|")[0])
    return 0 if sweep.good else 1


if __name__ == "__main__":
    sys.exit(main())
