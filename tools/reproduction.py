"""Every figure of the published systems that we know, beside ours.

    python tools/reproduction.py --out tools/tables/reproduction.md

Ours are forecasts of one training step (live bytes, FLOPs), never their numbers; accuracies and times take runs that nobody made here, and
those cells say "not measured". Theirs come from the papers named; memory there is what a GPU held, so only ratios compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from machine import heading

import graphopt
from graphopt.compiler.registry import passes
from graphopt.cost import Cost
from graphopt.errors import GraphoptError
from graphopt.models import cifar_resnet as cifar

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    system: str
    figure: str
    theirs: str
    ours: Callable[[], str] | None = None
    how: str = ""


BACKBONES: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "ResNet-110, CIFAR, batch 1024": (lambda: cifar.build("resnet110"), (3, 32, 32), 1024),
    "ResNet-32, CIFAR, batch 128": (lambda: cifar.build("resnet32"), (3, 32, 32), 128),
    "Swin-Tiny, 224 px, batch 128": (lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=10), (3, 224, 224), 128),
    "ViT-B/16, 224 px, batch 64": (lambda: timm.create_model("vit_base_patch16_224"), (3, 224, 224), 64),
    "ResNet-152, 32 px, batch 128": (lambda: torchvision.models.resnet152(num_classes=10), (3, 32, 32), 128),
}


@lru_cache(maxsize=64)
def costs(backbone: str, table: tuple[tuple[str, Any], ...]) -> tuple[Cost, Cost]:
    build, shape, batch = BACKBONES[backbone]
    options = dict(table)
    value = passes()[options.pop("use")].model_validate(options)
    report = graphopt.compile(build(), value, input=shape, batch=batch, verify="off").report
    return report.before, report.after


def change(field: str, backbone: str, **table: Any) -> tuple[Callable[[], str], str]:
    def ours() -> str:
        before, after = costs(backbone, tuple(table.items()))
        return f"{100 * (getattr(after, field) / getattr(before, field) - 1):+.1f} %"

    listed = ", ".join(f"{k} = {v!r}" for k, v in table.items())
    return ours, f"`{field}` forecast, {listed}; {backbone}"


def memory(system: str, figure: str, theirs: str, backbone: str, field: str = "peak_bytes", **table: Any) -> Row:
    return Row(system, figure, theirs, *change(field, backbone, **table))


R110, SWIN, VIT, R32 = (
    "ResNet-110, CIFAR, batch 1024", "Swin-Tiny, 224 px, batch 128", "ViT-B/16, 224 px, batch 64", "ResNet-32, CIFAR, batch 128"
)  # fmt: skip
INFOPRO = "InfoPro (ICLR 2021, Table 3)"
FEATURES = "feature reconstruction (arXiv 2212.14215)"
SHARING = "Replacement Learning (arXiv 2410.01239), parameter arithmetic"
DROPPING = "Learn&Drop (arXiv 2604.23403)"
IMAGE = {"use": "supervise", "balance": "memory", "decoder": "image", "head": "conv"}
VIT_SHARE = "ViT-B parameters (theirs: of the blocks' 85.05 M), attention only, k={k}"

ROWS = [
    *(
        memory(INFOPRO, f"memory, K={k}, balanced", theirs, R110, modules=k, **IMAGE)
        for k, theirs in ((2, "-42.8 %"), (3, "-55.1 %"), (4, "-62.6 %"))
    ),
    memory(INFOPRO, "memory, gradient checkpointing", "-58.4 %", R110, use="checkpoint", segments=7),
    memory("activation checkpointing", "compute", "about +33 %", R110, "flops", use="checkpoint", segments=7),
    Row(INFOPRO, "time overhead, K=2 / 3 / 4 / checkpointing", "1.3 / 3.3 / 5.9 / 32.8 %"),
    Row(INFOPRO, "CIFAR-10 error, end-to-end / K=2 / 3 / 4", "6.50 / 6.41 / 6.74 / 6.93 %"),
    *(
        memory(FEATURES, f"memory, K={k}", theirs, SWIN, use="supervise", modules=k, balance="stage" if k == 4 else "blocks")
        for k, theirs in ((2, "-36 %"), (4, "-45 %"))
    ),
    Row("arXiv 2309.17357", "Swin-Tiny K=4, CIFAR-10: end-to-end / InfoPro / features", "91.37 / 83.38 / 86.28 %"),
    Row("arXiv 2309.17357", "the same, CIFAR-100", "75.03 / 68.36 / 73.00 %"),
    Row("arXiv 2309.17357", "the same, STL-10", "72.19 / 64.61 / 66.89 %"),
    *(
        memory(SHARING, f"ResNet-110 parameters, k={k}", theirs, R110, "parameters", use="share", every=k)
        for k, theirs in ((2, "-39.4 %"), (3, "-28.0 %"), (4, "-21.3 %"))
    ),
    *(
        memory(SHARING, f"ResNet-32 parameters, k={k}", theirs, R32, "parameters", use="share", every=k)
        for k, theirs in ((2, "-21.7 %"), (4, "-4.9 %"))
    ),
    *(
        memory(SHARING, VIT_SHARE.format(k=k), theirs, VIT, "parameters", use="share", every=k)
        for k, theirs in ((4, "-5.6 %"), (2, "-13.9 %"))
    ),
    Row(DROPPING, "forward FLOPs over training, VGG-11 / ResNet-152", "-17.83 % / -83.74 %"),
    Row(DROPPING, "training time, MNIST, CIFAR-10, Imagenette", "more than halved"),
    Row(DROPPING, "accuracy, VGGs / ResNets", "-0.26 to -2.38 / -0.4 to -3.2 points"),
    Row("FreezeOut (arXiv 1706.04983)", "training time", "up to -20 %, nothing on VGG"),
    Row("AutoFreeze", "training time, BERT, one GPU, with caching", "2.55 x faster"),
    Row("Egeria", "training time", "-19 to -43 %"),
    Row("AugLocal", "memory", "about -40 %"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("Published figures beside ours", __doc__), "| system | figure | theirs | ours | how |", "|---|---|---|---|---|"]
    for row in ROWS:
        if options.only not in row.system + row.figure:
            continue
        try:
            ours = row.ours() if row.ours else NOT_MEASURED
        except (GraphoptError, KeyError, ValueError) as error:
            ours = f"{NOT_MEASURED}: {str(error).splitlines()[0][:120]}"
        lines.append(f"| {row.system} | {row.figure} | {row.theirs} | {ours} | {row.how} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
