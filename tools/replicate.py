"""Every figure of the published systems that we know, beside ours, each with the spec that makes it and the command that prints it.

    python tools/replicate.py [--only TEXT] [--out tools/tables/replicate.md]

Ours are forecasts of one training step or of one run (FLOPs, parameters, live bytes): exact, never a published number. Theirs come from the
papers named; a paper's memory is what a GPU held, ours live bytes: ratios compare. Accuracies and times of the papers take
their data and their devices: those rows name the study that measures them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from machine import heading

from graphopt.cli import main as graphopt

NOT_PUBLISHED, NOT_MEASURED = "not published where we could read", "not measured here"
INFOPRO = "InfoPro (ICLR 2021, Table 3)"
FEATURES = "feature reconstruction (arXiv 2212.14215)"
LATER = "feature reconstruction, as quoted by arXiv 2309.17357"
SHARING = "Replacement Learning (arXiv 2410.01239)"
SURROGATE = "RepL (arXiv 2605.19533)"
DROPPING = "Learn&Drop (arXiv 2604.23403)"

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One published figure; `read` takes ours from what `graphopt COMMAND --json` prints."""

    system: str
    figure: str
    published: str
    command: str
    read: Callable[[Answer], str] | None = None

    def ours(self) -> str:
        return NOT_MEASURED if self.read is None else self.read(answer(self.command))


def answer(command: str) -> Answer:
    """What a command prints as JSON; `check` prints it too where the data set is not here."""
    out = StringIO()
    with redirect_stdout(out):
        code = graphopt([*shlex.split(command), "--json"])
    try:
        value: Answer = json.loads(out.getvalue())
    except ValueError:
        raise SystemExit(f"`graphopt {command} --json` ended with {code} and printed no JSON") from None
    return value


def change(name: str) -> Callable[[Answer], str]:
    """How much a field of the forecast of one step changes, in percent; `flops` are forward and backward."""

    def read(report: Answer) -> str:
        before, after = (
            cost["forward_flops"] + cost["backward_flops"] if name == "flops" else cost[name]
            for cost in (report["before"], report["after"])
        )
        return f"{100 * (after / before - 1):+.1f} %"

    return read


def forward_flops(report: Answer) -> str:
    """Forward FLOPs of the whole run, evaluation and the filling of caches counted in, against the run without passes."""
    return f"{100 * (report['run']['forward_flops'] / report['run_before']['forward_flops'] - 1):+.2f} %"


def apply(system: str, figure: str, published: str, spec: str, name: str = "peak_bytes", **settings: object) -> Row:
    given = "".join(f" --set {shlex.quote(f'pass.0.{key}={json.dumps(value)}')}" for key, value in settings.items())
    return Row(system, figure, published, f"apply {spec}{given}", change(name))


def infopro() -> list[Row]:
    memory = [
        apply(INFOPRO, f"ResNet-110, memory, K={k}, balanced", theirs, f"infopro/resnet110-k{k}")
        for k, theirs in ((2, "-42.8 %"), (3, "-55.1 %"), (4, "-62.6 %"))
    ]
    segments = """apply infopro/resnet110-k2 --set 'pass=[{ use = "checkpoint", segments = 7 }]'"""
    return [
        *memory,
        Row(INFOPRO, "ResNet-110, memory, activation checkpointing", "-58.4 %", segments, change("peak_bytes")),
        Row(INFOPRO, "ResNet-110, compute, activation checkpointing", "about +33 %", segments, change("flops")),
        Row(INFOPRO, "ResNet-110, time, K=2 / 3 / 4 / checkpointing", "+1.3 / +3.3 / +5.9 / +32.8 %", "study infopro-resnet110"),
        Row(INFOPRO, "CIFAR-10 error, end-to-end / K=2 / 3 / 4", "6.50 / 6.41 / 6.74 / 6.93 %", "study infopro-resnet110"),
    ]


def features() -> list[Row]:
    theirs = {(2, "features, linear"): "-36 %", (4, "features, linear"): "-45 %"}
    decoders = {f"features, {structure}": {"structure": structure} for structure in ("linear", "pointwise", "conv", "transformer")}
    decoders |= {"image (InfoPro)": {"decoder": "image"}, "none (greedy)": {"decoder": "none"}}
    memory = [
        apply(FEATURES, f"Swin-T, memory, K={k}, {name}", theirs.get((k, name), NOT_PUBLISHED), "supervise/swin-t-k4", modules=k, **options)
        for k in (2, 3, 4, 8)
        for name, options in decoders.items()
    ]
    quoted = {"10": "91.37 / 83.38 / 86.28 %", "100": "75.03 / 68.36 / 73.00 %"}
    return [
        apply(FEATURES, "Swin-T, memory, K=4, cut by stage", "-45 %", "supervise/swin-t-by-stage"),
        *memory,
        *(
            Row(LATER, f"Swin-T, CIFAR-{n}, K=4: end-to-end / InfoPro / features", figures, f"study swin-cifar{n}")
            for n, figures in quoted.items()
        ),
        Row(LATER, "Swin-T, STL-10, K=4: end-to-end / InfoPro / features", "72.19 / 64.61 / 66.89 %", "study swin-stl10"),
    ]


def sharing() -> list[Row]:
    published = {("resnet110", 2): "-39.4 %", ("resnet110", 3): "-28.0 %", ("resnet110", 4): "-21.3 %", ("resnet32", 2): "-21.7 %"}
    published |= {("resnet32", 4): "-4.9 %", ("vit-b", 2): "-13.9 % of the blocks' 85.05 M", ("vit-b", 4): "-5.6 % of the blocks' 85.05 M"}
    rows = []
    for name in ("resnet32", "resnet110", "vit-b"):
        for k in (2, 3, 4):
            figure = f"{name}, parameters, k={k} (theirs: arithmetic of the method)"
            theirs = published.get((name, k), NOT_PUBLISHED)
            rows.append(apply(SHARING, figure, theirs, f"replacement/{name}", "parameters", every=k))
    for name in ("resnet32", "resnet110", "vit-b"):
        for field in ("parameters", "flops", "peak_bytes"):
            rows += [
                apply(SURROGATE, f"{name}, {field}, k={k}", NOT_PUBLISHED, f"replacement/repl-{name}", field, every=k) for k in (2, 3, 4)
            ]
    return rows


def dropping() -> list[Row]:
    published = {"vgg11": "-17.83 %", "resnet152": "-83.74 %"}
    names = ("vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    flops = [
        Row(DROPPING, f"{name}, forward FLOPs of the run", published.get(name, "between the two that are named"),
            f"check learn_and_drop/{name}", forward_flops)
        for name in names
    ]  # fmt: skip
    return [
        *flops,
        Row(DROPPING, "training time, MNIST, CIFAR-10, Imagenette", "more than halved", "study drop-resnet152"),
        Row(DROPPING, "points, VGGs / ResNets", "-0.26 to -2.38 / -0.4 to -3.2", "study drop-vgg11"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose system or figure has this text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("Published figures beside ours", __doc__), "| system | figure | published | ours | command |", "|---|---|---|---|---|"]
    for row in (*infopro(), *features(), *sharing(), *dropping()):
        if options.only in row.system + row.figure:
            lines.append(f"| {row.system} | {row.figure} | {row.published} | {row.ours()} | `graphopt {row.command}` |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
