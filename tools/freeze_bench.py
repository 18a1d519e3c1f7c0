"""What freezing saves, one run, one table: baseline, stock frozen, lean frozen; with the stem and behind a trainable one.

    python tools/freeze_bench.py [--batch 2] [--rounds 7] [--models resnet50 vit_s swin_t convnext_t] [--device cpu] [--amp] [--masks]

"Stock frozen" is what a careful user does by hand: no gradients for the front half of the blocks, its norms in eval mode. Saved bytes are
what autograd keeps between forward and backward, by unique storage, parameters and buffers aside. Step times are medians of forward and
backward, the variants taking turns within every round, as ratios to the baseline of the same round. Numbers of a busy machine are
worth little: close everything else, and look at the spread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.passes.freeze import Freeze, activations

#: how to build it, and the paths before its blocks
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "resnet50": (torchvision.models.resnet50, ("conv1", "bn1")),
    "vit_s": (lambda: timm.create_model("vit_small_patch16_224"), ("patch_embed", "cls_token", "pos_embed")),
    "swin_t": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), ("patch_embed",)),
    "convnext_t": (lambda: timm.create_model("convnext_tiny"), ("stem",)),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), ("conv_stem", "bn1")),
}
HALF = {"blocks": True, "first": 0.5}


def saved_bytes(module: nn.Module, step: Callable[[nn.Module], Tensor]) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step(module)
    del loss
    return sum(kept.values())


def by_hand(model: nn.Module, plan: graphopt.Plan) -> nn.Module:
    """The stock frozen twin of a plan."""
    model = copy.deepcopy(model).train()
    trains = {n: p.requires_grad for n, p in plan.module.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if hasattr(module, "running_mean") and own and not any(p.requires_grad for p in own):
            module.eval()
    return model


def bench(name: str, batch: int, rounds: int, device: str, amp: bool, table: Table) -> None:  # noqa: C901  # one measurement, top to bottom
    make, stem = MODELS[name]
    torch.manual_seed(0)
    model = make().train()

    def compiled(select: tuple[object, ...]) -> graphopt.Plan:
        return graphopt.compile(model, [Freeze(select=select)], input=(3, 224, 224), verify="off", costs=False)

    closed, behind = compiled((*stem, HALF)), compiled((HALF,))
    variants = {
        "baseline": model,
        "stock, stem frozen too": by_hand(model, closed),
        "lean, stem frozen too": closed.module,
        "stock, stem trains": by_hand(model, behind),
        "lean, stem trains": behind.module,
    }
    x = torch.randn(batch, 3, 224, 224, device=device)
    if device != "cpu":
        x = x.contiguous(memory_format=torch.channels_last)

    def forward(module: nn.Module) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            return module(x).float().square().mean()

    def step(module: nn.Module) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        forward(module).backward()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for module in variants.values():
        module.to(device).train()
        step(module)
    saved = {k: saved_bytes(m, forward) for k, m in variants.items()}
    times: dict[str, list[float]] = {k: [] for k in variants}
    for _ in range(rounds):
        for key, module in variants.items():
            times[key].append(step(module))
    for key in variants:
        ratios = sorted(t / b for t, b in zip(times[key], times["baseline"], strict=True))
        share = saved[key] / saved["baseline"]
        spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        table.add_row(name, key, f"{saved[key] / 2**20:.1f}", f"{share:.2f}", f"{statistics.median(ratios):.2f}", spread)
    table.add_section()


def bench_masks(console: Console) -> None:
    """The lean ReLU's forward and backward against the stock one's, per memory format."""
    x = torch.randn(8, 64, 56, 56)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        upstream = torch.randn_like(leaf)
        times: dict[str, list[float]] = {"stock": [], "lean": []}
        for _ in range(30):
            for key, function in (("stock", torch.relu), ("lean", activations.relu)):
                start = time.perf_counter()
                torch.autograd.grad(function(leaf), leaf, upstream)
                times[key].append(time.perf_counter() - start)
        ratio = statistics.median(times["lean"]) / statistics.median(times["stock"])
        console.print(f"lean ReLU over stock ReLU, forward and backward, {layout}: {ratio:.2f} (median of 30)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "vit_s", "swin_t", "convnext_t"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--masks", action="store_true", help="only compare a lean ReLU with a stock one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    if options.masks:
        bench_masks(console)
        return
    where = f"{options.device}, torch {torch.__version__}, batch {options.batch}, 224 px, front half of the blocks frozen"
    table = Table("backbone", "variant", "saved MiB", "of baseline", "step time", "spread", title=where)
    for name in options.models:
        bench(name, options.batch, options.rounds, options.device, options.amp, table)
    console.print(table)


if __name__ == "__main__":
    main()
