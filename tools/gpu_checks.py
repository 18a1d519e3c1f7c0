"""What a GPU says to the forecasts: `max_memory_allocated` of real training steps beside them, and the workspaces that forecasts leave out.

    python tools/gpu_checks.py --out tools/tables/gpu_checks.md

Without a GPU it says so and prints nothing else. The workspace term is taken from one half of the backbones and tried on the other half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from machine import device, heading
from torch.nn import functional as F

from graphopt.cost import forecast

#: (name, batch); even rows calibrate, odd rows are held out
CASES = (
    ("resnet50", 64), ("resnet18", 128), ("swin_t", 64), ("vit_b_16", 64), ("densenet121", 64), ("efficientnet_b0", 128),
    ("convnext_tiny", 64), ("mobilenet_v3_large", 128), ("vgg11", 64), ("regnet_y_400mf", 128),
)  # fmt: skip


def real_peak(name: str, batch: int, amp: bool) -> int:
    """Bytes of the allocator's blocks at the peak of the third step."""
    torch.cuda.empty_cache()
    model = getattr(torchvision.models, name)(weights=None).cuda().train()
    # Not the for-each form, whose passing results the CPU's optimizer does not have.
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, foreach=False)
    x, target = torch.randn(batch, 3, 224, 224, device="cuda"), torch.zeros(batch, dtype=torch.long, device="cuda")
    for number in range(3):
        if number == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU here ({device()}): nothing was measured")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    for amp in (False, True):
        for name, batch in CASES:
            with torch.device("meta"):
                module = getattr(torchvision.models, name)()
            cost = forecast(module, (3, 224, 224), batch, amp="bfloat16" if amp else None)
            found.append((name, batch, amp, cost, real_peak(name, batch, amp)))
            print(name, batch, amp, cost.peak_block_bytes, found[-1][-1], flush=True)
    lines = [heading("Forecast against torch.cuda.max_memory_allocated, 224 px, SGD with momentum", __doc__)]
    lines += ["| backbone | batch | autocast | forecast, MiB | real, MiB | ratio | with workspace | used for |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for amp in (False, True):
        rows = [row for row in found if row[2] is amp]
        extra = sorted(max(0, real - cost.peak_block_bytes) for *_, cost, real in rows[::2])
        workspace = extra[len(extra) // 2]
        for number, (name, batch, _, cost, real) in enumerate(rows):
            plain, full = cost.peak_block_bytes, cost.peak_block_bytes + workspace
            use = "calibration" if number % 2 == 0 else "held out"
            figures = f"{plain / 2**20:.0f} | {real / 2**20:.0f} | {plain / real:.3f} | {full / real:.3f}"
            lines.append(f"| {name} | {batch} | {'bfloat16' if amp else 'none'} | {figures} | {use} |")
        kind = "bfloat16" if amp else "float32"
        lines.append(f"\nWorkspace, {kind}: {workspace / 2**20:.0f} MiB, median over {len(extra)} backbones.\n")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
