"""The smallest capacity of a GPU's allocator at which the README's examples still run a training step, forecast without a GPU.

    python tools/readme_capacity.py --out tools/tables/readme_capacity.md

MiB, with unmeasured terms at their lower and upper bounds; bfloat16 autocast and SGD with momentum. The driver's context comes on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torchvision
from machine import heading
from torch import nn

import graphopt
from graphopt.compiler.pass_base import Pass
from graphopt.cost import Cost, forecast
from graphopt.cost.devices import DEVICES
from graphopt.ir.selector import Filter
from graphopt.models import cifar_resnet
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise

Example = tuple[Callable[[], nn.Module], tuple[int, ...], int, Sequence[Pass]]
_HALF = ("conv1", "bn1", "layer1.**", Filter(blocks=True, first=0.5, exclude="layer3.**"))
EXAMPLES: dict[str, Example] = {
    "ResNet-50, front half frozen": (
        lambda: torchvision.models.resnet50(), (3, 224, 224), 64, [Freeze(select=("conv1", "bn1", "layer1", "layer2"))],
    ),
    "ResNet-20 on digits, front half frozen": (
        lambda: cifar_resnet.build("resnet20", in_chans=1), (1, 16, 16), 64, [Freeze(select=_HALF)],
    ),
    "ResNet-18, layer1 frozen": (
        lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 8, [Freeze(select=("conv1", "bn1", "layer1"))],
    ),
    "ResNet-18, 4 supervised modules": (
        lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 8, [Supervise(modules=4, balance="memory")],
    ),
}  # fmt: skip


def capacity(cost: Cost) -> str:
    assert cost.cuda is not None
    low, high = (size / 2**20 for size in cost.cuda.capacity)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def row(name: str, device: str) -> str:
    make, input, batch, passes = EXAMPLES[name]
    cells = []
    for added in ([], list(passes)):
        plan = graphopt.compile(make(), added, input=input, verify="off", costs=False)
        targets = plan.needs.targets
        cells.append(capacity(forecast(plan.module, input, batch, amp="bfloat16", device=DEVICES[device], targets=targets)))
    return f"| {name} | {batch} | {device} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [heading("Smallest capacity for the README's examples, MiB, forecast", __doc__)]
    lines += ["| example | batch | device | without passes | with them |", "|---" * 5 + "|"]
    for name in EXAMPLES:
        for device in ("A100", "H100", "RTX 4090"):
            lines.append(row(name, device))
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
