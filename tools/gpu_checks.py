"""Forecasts of a GPU's memory beside the real thing: peaks of three training steps, and a replay of what the allocator did in them.

    python tools/gpu_checks.py --device H100 --out tools/tables/gpu_checks.md --recordings recordings

Without a GPU it says so and measures nothing. A recording holds addresses and sizes of all requests; `graphopt.cost.replay` reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torchvision
from machine import device, heading
from torch.nn import functional as F

from graphopt.cost import forecast
from graphopt.cost.devices import DEVICES, Device, find_device
from graphopt.cost.memory import Band
from graphopt.cost.replay import read_snapshot, replay

CASES = (
    ("resnet50", 64), ("resnet18", 128), ("swin_t", 64), ("vit_b_16", 64), ("densenet121", 64), ("efficientnet_b0", 128),
    ("convnext_tiny", 64), ("mobilenet_v3_large", 128), ("vgg11", 64), ("regnet_y_400mf", 128),
)  # fmt: skip
OPTIONS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
COLUMNS = ("backbone", "batch", "autocast", "allocated, MiB", "forecast", "reserved, MiB", "forecast", "replay differs")


def record(name: str, batch: int, amp: bool, path: Path) -> tuple[int, int]:
    """Bytes allocated and reserved at the peak of three steps, as the allocator counts them; writes its recording."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history(context=None, clear_history=True)
    model = getattr(torchvision.models, name)(weights=None).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    for _ in range(3):
        x, target = torch.randn(batch, 3, 224, 224, device="cuda"), torch.zeros(batch, dtype=torch.long, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(None)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def bounds(band: Band, real: int) -> str:
    """The bounds in MiB, and by how much the nearer one is off."""
    nearest = min(max(real, band.low), band.high)
    return f"{band.low / 2**20:.0f} to {band.high / 2**20:.0f} ({100 * (nearest / real - 1):+.1f} %)"


def row(name: str, batch: int, amp: bool, gpu: Device, folder: Path) -> str:
    path = folder / f"{name}-{'bfloat16' if amp else 'float32'}.pickle"
    allocated, reserved = record(name, batch, amp, path)
    found = replay(read_snapshot(path), peak_allocated=allocated)
    with torch.device("meta"):
        module = getattr(torchvision.models, name)()
    cost = forecast(module, (3, 224, 224), batch, amp="bfloat16" if amp else None, device=gpu)
    assert cost.cuda is not None
    real = f"{allocated / 2**20:.0f} | {bounds(cost.cuda.allocated, allocated)} | {reserved / 2**20:.0f}"
    differs = found.differences[0] if found.differences else "no"
    return f"| {name} | {batch} | {'bfloat16' if amp else 'none'} | {real} | {bounds(cost.cuda.reserved, reserved)} | {differs} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="H100", help=f"what is here: {', '.join(DEVICES)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recordings", type=Path, default=Path("recordings"))
    options = parser.parse_args()
    gpu = find_device(options.device)
    if not torch.cuda.is_available():
        print(f"no GPU here ({device()}): nothing was measured")
        return 0
    options.recordings.mkdir(parents=True, exist_ok=True)
    lines = [
        heading("Memory of three steps on a GPU, 224 px, SGD with momentum", __doc__),
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for amp in (False, True):
        for name, batch in CASES:
            lines.append(row(name, batch, amp, gpu, options.recordings))
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
