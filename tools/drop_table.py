"""Forward FLOPs that the Learn&Drop specs save, averaged over the run and at its end, worked out from the specs alone.

    python tools/drop_table.py --out tools/tables/drop_flops.md

Evaluation and the filling of caches are counted in; the paper's figures (arXiv 2604.23403) stand beside ours where it gives one, as
published and not as measured. Scored specs have nothing to show before they have run: see `drop_accuracy.py`, or
`graphopt check RUN --json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import heading

from graphopt.driver import build_backbone as build
from graphopt.driver import compile
from graphopt.planning.run_cost import counts, forecast_run
from graphopt.spec import load
from graphopt.units import show_count, show_size

SPECS = {
    "learn_and_drop/vgg11": "17.83 %",
    "learn_and_drop/vgg16": "",
    "learn_and_drop/resnet50": "",
    "learn_and_drop/resnet152": "83.74 %",
}


def row(name: str, published: str) -> str:
    """One line of the table."""
    spec = load(name)
    with torch.device("meta"):
        model = build(spec.backbone)
    plan = compile(model, spec, verify="off", costs=False)
    samples, evaluated = counts(spec.data)
    work = forecast_run(plan, spec.train, samples=samples, evaluated=evaluated)
    taken = ", ".join(f"{d.epoch}: {d.regions[-1]}" for phase in work.phases for d in phase.decisions if d.regions)
    backward = 1 - work.run.backward_flops / work.before.backward_flops
    cells = (
        name,
        published,
        f"{100 * work.forward_saved:.2f} %",
        f"{100 * work.training_forward_saved:.2f} %",
        f"{100 * work.final_forward_saved:.2f} %",
        f"{100 * backward:.2f} %",
        show_count(work.run.filling_forward_flops),
        show_size(work.run.feature_bytes),
        f"{taken} of {work.epochs}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    columns = (
        "spec",
        "paper: forward saved",
        "forward saved, all in",
        "training and filling",
        "a step at the end",
        "backward saved",
        "filling FLOP",
        "largest cache",
        "epoch: dropped up to",
    )
    lines = [heading("drop: forward FLOPs over the run", __doc__), f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, published in SPECS.items():
        lines.append(row(name, published))
        print(lines[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
