"""Every pass on a GPU beside plain training and checkpointing: time, images/s and memory of a step, and the forecasts of them.

    python tools/gpu_passes.py --device H100 --out tools/tables/gpu_passes.md

ResNet-50, Swin-T, ViT-S and ConvNeXt-T at 224 px, bfloat16 autocast, channels_last, SGD with momentum, eager. Without a GPU it says so and
measures nothing; `--dry` then runs two steps of small networks on the CPU, so that everything but the figures is tried.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from machine import device, heading
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.compiler.pass_base import Pass
from graphopt.compiler.stages import trained as trained_part
from graphopt.cost import forecast
from graphopt.cost.devices import DEVICES, Device, find_device
from graphopt.cost.memory import Band
from graphopt.ir.selector import Filter
from graphopt.models import cifar_resnet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise

OPTIONS = {"momentum": 0.9, "nesterov": True}
COLUMNS = (
    "backbone", "batch", "passes", "ms a step", "images/s", "at least, ms", "allocated, MiB", "forecast", "reserved, MiB", "forecast",
)  # fmt: skip


class Case(NamedTuple):
    """A backbone to train.

    Attributes:
        make: makes it. size: of its images. prefix: the block up to which it is dropped. budget: of checkpoint. modules: of supervise.
    """

    make: Callable[[], nn.Module]
    size: int
    batch: int
    prefix: str
    budget: float = 0.5
    modules: int = 4


CASES = {
    "ResNet-50": Case(lambda: timm.create_model("resnet50"), 224, 128, "layer2.3"),
    "Swin-T": Case(lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224, 128, "layers.2.blocks.1"),
    "ViT-S": Case(lambda: timm.create_model("vit_small_patch16_224"), 224, 128, "blocks.5"),
    "ConvNeXt-T": Case(lambda: timm.create_model("convnext_tiny"), 224, 128, "stages.2.blocks.3"),
}
DRY = {"resnet20": Case(lambda: cifar_resnet.build("resnet20"), 16, 4, "layer1.0", 0.8, 2)}


def variants(case: Case) -> Iterator[tuple[str, Sequence[Pass] | None]]:
    """What is measured of a backbone; None is timm's own checkpointing."""
    yield "none", ()
    yield "timm's set_grad_checkpointing()", None
    yield "checkpoint, every block", (Checkpoint(segments="every block"),)
    yield f"checkpoint, budget {case.budget:g}", (Checkpoint(budget=case.budget),)
    yield "freeze, the first half of the blocks", (Freeze(select=Filter(blocks=True, first=0.5)),)
    yield f"drop up to {case.prefix}", (Drop(upto=case.prefix),)
    yield f"supervise, {case.modules} modules", (Supervise(modules=case.modules, balance="memory"),)
    yield "share, every other block", (Share(every=2, boundary="nearest"),)


class Trained(NamedTuple):
    """What a step trains, the shape of one sample of its input (images, or features of a dropped prefix), and whether it takes targets."""

    module: nn.Module
    input: Any
    targets: bool


def compiled(case: Case, passes: Sequence[Pass] | None) -> Trained:
    model, image = case.make(), (3, case.size, case.size)
    if passes is None:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's
        return Trained(model, image, targets=False)
    plan = graphopt.compile(model, list(passes), input=image, verify="off", costs=False)
    return Trained(*trained_part(plan), plan.needs.targets)


def train(trained: Trained, batch: int, where: str, steps: int) -> float:
    """Takes so many steps; the seconds of the fastest but the first."""
    module = trained.module.to(where, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch's own overload
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01, **OPTIONS)  # type: ignore[arg-type]  # flags
    layout = torch.channels_last if len(trained.input) == 3 else torch.contiguous_format
    taken = []
    for _ in range(steps):
        synchronize(where)
        start = time.perf_counter()
        x = torch.empty(batch, *trained.input, device=where, memory_format=layout).normal_()
        y = torch.zeros(batch, dtype=torch.long, device=where)
        with torch.autocast(where, dtype=torch.bfloat16):
            out, local = module(x, y) if trained.targets else (module(x), None)
            loss = F.cross_entropy(out, y)
        (loss if local is None else loss + local).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(where)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def synchronize(where: str) -> None:
    if where == "cuda":
        torch.cuda.synchronize()


def bounds(band: Band, real: int) -> str:
    """The bounds in MiB, and by how much the nearer one is off what was measured, if anything was."""
    shown = f"{band.low / 2**20:.0f} to {band.high / 2**20:.0f}"
    nearest = min(max(real, band.low), band.high)
    return f"{shown} ({100 * (nearest / real - 1):+.1f} %)" if real else shown


def row(name: str, case: Case, label: str, passes: Sequence[Pass] | None, gpu: Device, *, dry: bool) -> str:
    trained = compiled(case, passes)
    options = {"targets": trained.targets, "amp": "bfloat16", "optimizer": "sgd", "optimizer_options": OPTIONS, "device": gpu}
    cost = forecast(trained.module, trained.input, case.batch, **options)  # type: ignore[arg-type]  # one dictionary of several types
    assert cost.cuda is not None
    assert cost.roofline_seconds is not None
    allocated = reserved = 0
    if dry:
        train(trained, case.batch, "cpu", 2)
        time_shown = speed = "-"
    else:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = train(trained, case.batch, "cuda", 12)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        time_shown, speed = f"{1000 * seconds:.1f}", f"{case.batch / seconds:.0f}"
    memory = (f"{allocated / 2**20:.0f}" if allocated else "-", bounds(cost.cuda.allocated, allocated))
    held = (f"{reserved / 2**20:.0f}" if reserved else "-", bounds(cost.cuda.reserved, reserved))
    cells = (name, str(case.batch), label, time_shown, speed, f"{1000 * cost.roofline_seconds:.1f}", *memory, *held)
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="H100", help=f"what is here: {', '.join(DEVICES)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="no GPU: two steps of small networks on the CPU, and no figure of them")
    options = parser.parse_args(arguments)
    gpu = find_device(options.device)
    if not options.dry and not torch.cuda.is_available():
        print(f"no GPU here ({device()}): nothing was measured")
        return 0
    title = (
        "Dry run on the CPU: forecasts alone, nothing was measured" if options.dry else "Passes on a GPU, 224 px, bfloat16, channels_last"
    )
    lines = [heading(title, __doc__), f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, case in (DRY if options.dry else CASES).items():
        for label, passes in variants(case):
            try:
                lines.append(row(name, case, label, passes, gpu, dry=options.dry))
            except Exception as error:  # of one row: the others are of use without it
                if options.dry and passes is not None:
                    raise
                lines.append(f"| {name} | {case.batch} | {label} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
