"""What local supervision saves and costs, one run, one table: end-to-end, activation checkpointing, and K = 2, 3, 4, 8, 16 modules.

    python tools/supervise_bench.py [--models resnet110 swin_t vit_s resnet50] [--rounds 6] [--launches 4]
                                    [--compare decoders | heads] [--device cpu] [--amp]

Cuts are `balance = "memory"`, the decoder the default one, unless `--compare` takes decoders at K = 4, or heads at K = 8 (with even cuts
and no decoder, InfoPro's aside). "Peak" is the forecast
`peak_activation_bytes` of one training step over the end-to-end step's, at `--batch` (128; float32). "Auxiliary" is the share of the step's
FLOPs that heads and decoders take. "Step time" is the median over rounds of forward and backward over the end-to-end step of the same
round, the variants taking turns in random order, at `--time-batch` (by backbone): on a CPU one thread's processor time, so that a busy
machine disturbs less. There each variant has a process of its own, as training has, launched anew `--launches` times: memory that the
allocator gives back to the system and must ask for again is a tenth of a CPU step and more, and in one process (`--launches 0`) what one
variant leaves lying decides about the others'. On a GPU wall time, in one process. With `--device cuda` the last column is
`torch.cuda.max_memory_allocated` of a step at `--batch`, less what was allocated before it (parameters, optimizer state aside), over
end-to-end's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from machine import heading
from on_graph import plan_on
from torch import nn

from graphopt import trace
from graphopt.compiler.pass_base import Pass
from graphopt.cost import Cost, forecast
from graphopt.errors import GraphoptError
from graphopt.ir.graph import Graph
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.supervise import Supervise
from graphopt.passes.supervise.options import Lookahead

#: how to build it, one sample, and the batch its CPU steps are timed at
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet110": (lambda: cifar.build("resnet110"), (3, 32, 32), 32),
    "swin_t": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), (3, 224, 224), 4),
    "vit_s": (lambda: timm.create_model("vit_small_patch16_224"), (3, 224, 224), 4),
    "resnet50": (torchvision.models.resnet50, (3, 224, 224), 4),
}


def variants(compared: str | None) -> dict[str, Pass | None]:
    if compared == "heads":
        eight: dict[str, Any] = {"modules": 8, "decoder": "none"}
        return {
            "end-to-end": None,
            "pool (greedy)": Supervise(**eight),
            "dictionary": Supervise(**eight, head="dictionary"),
            "ahead, depth 1": Supervise(**eight, head="ahead", depth=1),
            "ahead, depth 2": Supervise(**eight, head="ahead"),
            "ahead, depth 4": Supervise(**eight, head="ahead", depth=4),
            "lookahead, block": Supervise(**eight, lookahead=Lookahead(bias="block")),
            "lookahead, scale": Supervise(**eight, lookahead=Lookahead()),
            "lookahead, mean alone": Supervise(**eight, lookahead=Lookahead(bias="none")),
            "image (InfoPro)": Supervise(modules=8, decoder="image", head="conv"),
        }
    if compared is None:
        ours = {f"K = {k}": Supervise(modules=k, balance="memory") for k in (2, 3, 4, 8, 16)}
        return {"end-to-end": None, "checkpointing, 8 segments": Checkpoint(segments=8), **ours}
    four: dict[str, Any] = {"modules": 4, "balance": "memory"}
    return {
        "end-to-end": None,
        "features, linear (default)": Supervise(**four),
        "features, linear, all positions": Supervise(**four, fraction=1.0),
        "features, pointwise": Supervise(**four, structure="pointwise"),
        "features, conv": Supervise(**four, structure="conv"),
        "features, conv, all positions": Supervise(**four, structure="conv", fraction=1.0),
        "features, transformer": Supervise(**four, structure="transformer"),
        "image (InfoPro)": Supervise(**four, decoder="image"),
        "image, contrast (InfoPro)": Supervise(**four, decoder="image", head="contrast"),
        "none (greedy)": Supervise(**four, decoder="none"),
    }


def made(backbone: nn.Module, base: Graph, value: Pass | None) -> tuple[nn.Module, bool]:
    """The emitted module, and whether it takes targets."""
    plan = plan_on(backbone, base, [] if value is None else [value])
    return plan.module, plan.needs.targets


class Timed:
    """One variant on the device, ready to step: forward, losses, backward."""

    def __init__(self, module: nn.Module, targets: bool, device: str, amp: bool) -> None:
        self.module, self.targets, self.device, self.amp = module.to(device).train(), targets, device, amp

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Seconds of one step; its gradients are freed afterwards."""
        start = self._now()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            if self.targets:
                output, local = self.module(x, y)
                loss = F.cross_entropy(output, y) + local
            else:
                output = self.module(x)
                loss = F.cross_entropy(output, y)
        loss.backward()
        # Taking the graph down belongs to a step, of whichever kind.
        output = local = loss = None
        took = self._now() - start
        for parameter in self.module.parameters():
            parameter.grad = None
        return took

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def allocated(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """Bytes a step allocates at its highest, above what was there."""
        self.step(x, y)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(x, y)
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Timing:
    """How variants are timed on a CPU: threads, autocast, what is compared, and the batch (None: by backbone)."""

    threads: int = 1
    amp: bool = False
    compare: str | None = None
    batch: int | None = None


class Apart:
    """One variant in a process of its own."""

    def __init__(self, name: str, label: str, timing: Timing) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.line, end = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(end, name, label, timing), daemon=True)
        self.process.start()
        end.close()  # so that a process that died is an end of file here
        self.line.recv()  # it has warmed up

    def step(self) -> float:
        self.line.send(True)
        return float(self.line.recv())

    def close(self) -> None:
        self.line.send(False)
        self.process.join()


def _serve(line: Connection, name: str, label: str, timing: Timing) -> None:
    torch.set_num_threads(timing.threads)
    torch.manual_seed(0)
    make, input, _ = MODELS[name]
    backbone = make()
    module, targets = made(backbone, trace(backbone, input, compare=False), variants(timing.compare)[label])
    variant, batch = Timed(module, targets, "cpu", timing.amp), data(name, time_batch(name, timing), "cpu")
    for _ in range(2):
        variant.step(*batch)
    line.send(None)
    while line.recv():
        line.send(variant.step(*batch))


def data(name: str, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, *MODELS[name][1], device=device), torch.randint(0, 10, (count,), device=device)


def time_batch(name: str, timing: Timing) -> int:
    return timing.batch or MODELS[name][2]


def turns(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one step per round, in another order in every round."""
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label in random.sample(list(steps), len(steps)):
            seconds[label].append(steps[label]())
    return seconds


def bench(name: str, options: argparse.Namespace) -> list[str]:
    make, input, _ = MODELS[name]
    torch.manual_seed(0)
    backbone = make()
    base = trace(backbone, input, compare=False)
    costs: dict[str, Cost] = {}
    timed: dict[str, Timed] = {}
    for label, value in variants(options.compare).items():
        try:
            module, targets = made(backbone, base, value)
        except GraphoptError as error:
            print(f"{name}, {label}: {error}")
            continue
        costs[label] = forecast(copy.deepcopy(module), input, options.batch, targets=targets, amp="bfloat16" if options.amp else None)
        timed[label] = Timed(module, targets, options.device, options.amp)
        print(f"{name}, {label}: peak {costs[label].peak_activation_bytes / 2**20:.0f} MiB", flush=True)
    timing = Timing(options.threads, options.amp, options.compare, options.time_batch)
    if options.launches and options.device == "cpu":
        timed.clear()
        seconds: dict[str, list[float]] = {label: [] for label in costs}
        for _ in range(options.launches):
            apart = {label: Apart(name, label, timing) for label in costs}
            for label, found in turns({label: one.step for label, one in apart.items()}, options.rounds).items():
                seconds[label] += found
            for one in apart.values():
                one.close()
    else:
        batch = data(name, time_batch(name, timing), options.device)
        for variant in timed.values():
            variant.step(*batch)
        seconds = turns({label: partial(variant.step, *batch) for label, variant in timed.items()}, options.rounds)
    allocated: dict[str, int] = {}
    if options.device != "cpu":
        batch = data(name, options.batch, options.device)
        allocated = {label: variant.allocated(*batch) for label, variant in timed.items()}
    first = "end-to-end"
    lines = []
    for label, cost in costs.items():
        ratios = sorted(t / b for t, b in zip(seconds[label], seconds[first], strict=True))
        extra = sum(r.forward_flops + r.backward_flops for r in cost.rows if r.path.startswith("supervise."))
        cells = [
            name, label, f"{cost.peak_activation_bytes / 2**20:.0f}",
            f"{cost.peak_activation_bytes / costs[first].peak_activation_bytes:.3f}", f"{extra / cost.flops:.1%}",
            f"{statistics.median(ratios):.3f}" if ratios else "", " to ".join(f"{q:.2f}" for q in quartiles(ratios)),
        ]  # fmt: skip
        cells += [f"{allocated[label] / 2**20:.0f} ({allocated[label] / allocated[first]:.3f})"] if allocated else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def quartiles(ratios: list[float]) -> list[float]:
    return statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=128, help="of the forecast, and of the GPU's memory")
    parser.add_argument("--time-batch", type=int, help="default: by backbone")
    parser.add_argument("--rounds", type=int, default=6, help="per launch")
    parser.add_argument("--launches", type=int, default=4, help="of a process for every variant, on a CPU; 0: all in this one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compare", choices=("decoders", "heads"), help="instead of numbers of modules")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = ["backbone", "variant", f"peak MiB at batch {options.batch}", "peak", "auxiliary", "step time", "its quartiles"]
    head += ["max_memory_allocated MiB"] if options.device != "cpu" else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in options.models:
        lines += bench(name, options)
    text = heading("Local supervision: memory and time", __doc__) + "\n" + "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
