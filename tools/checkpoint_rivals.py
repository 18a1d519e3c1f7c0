"""`checkpoint` beside timm's `set_grad_checkpointing()` and torch's `activation_memory_budget`.

    python tools/checkpoint_rivals.py --out tools/tables/checkpoint_rivals.md

First table: forecasts of a step of 8 images at 224 px, as shares of the plain one's peak of activations and FLOPs. The budget of ours is
timm's peak, and a half. Second table: real steps of small networks with dropout and drop-path, as float32 on the CPU. For each budget, the
largest difference of a gradient from the plain step of the same kind (eager for ours, compiled with a budget of 1 for torch's, whose random
masks are others than eager's), and the bytes that autograd holds after the forward, as a share of the plain step's.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import heading
from torch import nn
from torch._functorch import config
from torch.nn import functional as F

import graphopt
from graphopt.cost import Cost, forecast
from graphopt.errors import PassError
from graphopt.passes.checkpoint import Checkpoint

Gradients = dict[str, torch.Tensor]
BUDGETS = (0.9, 0.7, 0.5, 0.3)
LARGE = ("resnet50", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")


def large(name: str) -> str:
    """A row of the first table."""
    module = timm.create_model(name)

    def cost(of: nn.Module) -> Cost:
        return forecast(of, (3, 224, 224), 8, optimizer=None)

    plain = cost(module)

    def shown(found: Cost) -> str:
        return f"{found.peak_activation_bytes / plain.peak_activation_bytes:.3f} at {found.flops / plain.flops:.3f}"

    module.set_grad_checkpointing(True)  # type: ignore[operator]  # every timm backbone has it
    theirs = cost(module)
    module.set_grad_checkpointing(False)  # type: ignore[operator]  # and off
    cells = [shown(theirs)]
    for options in (
        {"segments": "every block"},
        {"segments": 12},
        {"budget": theirs.peak_activation_bytes / plain.peak_activation_bytes},
        {"budget": 0.5},
    ):
        try:
            plan = graphopt.compile(module, Checkpoint(**options), input=(3, 224, 224), verify="off", costs=False)
            cells.append(shown(cost(plan.module)))
        except PassError:
            cells.append("-")
    return f"| {name} | {' | '.join(cells)} |"


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(4):
        layers += [nn.Linear(192, 192), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(192, 10)), (3, 8, 8)


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 4, "embed_dim": 64, "num_heads": 4, "num_classes": 10}
    rates: dict[str, Any] = {"drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **rates), (3, 32, 32)


def convnext() -> tuple[nn.Module, tuple[int, ...]]:
    return timm.create_model("convnext_atto", depths=(2, 2, 2, 2), num_classes=10, drop_path_rate=0.3, drop_rate=0.2), (3, 64, 64)


SMALL: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "MLP with dropout": mlp, "ViT of 4 blocks": vit, "ConvNeXt of 8 blocks": convnext,
}  # fmt: skip


class _Held:
    """Bytes of the storages that autograd holds for the backward, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {p.untyped_storage()._cdata for p in module.parameters()}
        self.sizes: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def step(module: nn.Module, call: nn.Module, input: tuple[int, ...]) -> tuple[Gradients, int]:
    """Gradients of a step that calls `module` as `call`, and the bytes held after its forward."""
    module.train().zero_grad()
    torch.manual_seed(1)
    x, y = torch.randn(8, *input), torch.arange(8)
    held = _Held(module)
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(held, lambda t: t):
        out = call(x)
    F.cross_entropy(out, y).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}, sum(held.sizes.values())


def difference(one: Gradients, other: Gradients) -> float:
    assert one.keys() == other.keys()
    return max(float((gradient - other[name]).abs().max()) for name, gradient in one.items())


def compiled(module: nn.Module, budget: float) -> nn.Module:
    torch._dynamo.reset()
    gc.collect()
    config.activation_memory_budget = budget
    found: Any = torch.compile(module, backend="aot_eager_decomp_partition")
    return found


def small(name: str) -> list[str]:
    """The two rows of a network in the second table."""
    torch.manual_seed(0)
    module, input = SMALL[name]()
    rows = []
    untouched = graphopt.compile(module, [], input=input, verify="off", costs=False).module
    plain, held = step(untouched, untouched, input)
    cells = []
    for budget in BUDGETS:
        try:
            plan = graphopt.compile(module, Checkpoint(budget=budget), input=input, verify="off", costs=False)
        except PassError:
            cells.append("-")
            continue
        gradients, kept = step(plan.module, plan.module, input)
        cells.append(f"{difference(plain, gradients):.2g}, {kept / held:.2f}")
    rows.append(f"| {name} | checkpoint | {' | '.join(cells)} |")
    cells = []
    try:
        plain, held = step(module, compiled(module, 1.0), input)
        for budget in BUDGETS:
            gradients, kept = step(module, compiled(module, budget), input)
            cells.append(f"{difference(plain, gradients):.2g}, {kept / held:.2f}")
    except Exception as error:  # what torch cannot compile is a result
        cells = [f"refused: {type(error).__name__}"] * len(BUDGETS)
    rows.append(f"| {name} | activation_memory_budget | {' | '.join(cells)} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("Peak of activations and FLOPs, as shares of the plain step's", __doc__)]
    lines += [
        "| backbone | timm's set_grad_checkpointing() | every block | 12 segments | budget: timm's peak | budget 0.5 |",
        "|---" * 6 + "|",
    ]
    lines += map(large, LARGE)
    lines += ["", "Largest difference of a gradient from the plain step's, and the share of bytes held after the forward, by budget:", ""]
    lines += [f"| network | by | {' | '.join(map(str, BUDGETS))} |", "|---" * (2 + len(BUDGETS)) + "|"]
    for name in SMALL:
        lines += small(name)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
