"""Forecast next to measurement: live bytes and messages of a step on 2 and 3 gloo ranks. Run with PYTHONPATH=. from the repository's root.

With `--append`, rows go behind those that are there, those of `--accumulate` micro-batches per step, say.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import distributed

import graphopt
from graphopt.compiler.plan import Plan
from graphopt.cost import Cost, measure
from graphopt.cost.ranks import Parallel
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.planning.ranks import forecast_ranks, sharded, trained_part
from graphopt.spec import TrainSpec
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Replicated
from tests.support.ranks import run_ranks

PASSES = ("none", "freeze", "share", "supervise", "checkpoint", "drop")
BACKBONES = {"resnet20": "layer1.0", "vit": "blocks.0"}


def passes_of(backbone: str) -> dict[str, list[Any]]:
    frozen = Freeze(select=[BACKBONES[backbone]])
    return {
        "none": [],
        "freeze": [frozen],
        "share": [Share(every=2)],
        "supervise": [Supervise(modules=2)],
        "checkpoint": [Checkpoint(segments=3)],
        "drop": [Drop(upto=BACKBONES[backbone], when="start", force=True)],
    }


def plan_of(backbone: str, name: str) -> Plan:
    torch.manual_seed(0)
    if backbone == "vit":
        module: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)
    else:
        module = CifarResNet(20)
    return graphopt.compile(module, passes_of(backbone)[name], input=(3, 32, 32), verify="off", costs=False).phases(1)[0].plan


def train_of(strategy: str, accumulate: int) -> TrainSpec:
    table = {"epochs": 1, "batch": 12, "accumulate": accumulate, "device": "cpu", "strategy": strategy}
    return TrainSpec.model_validate(table)


def figures(cost: Cost) -> dict[str, Any]:
    return {"peak": cost.peak_bytes, "messages": [(m.name, m.calls, m.bytes, m.sizes) for m in cost.collectives]}


def compare(rank: int, backbone: str, strategy: str, accumulate: int, forecasts: Mapping[str, dict[str, Any]], out: Path) -> None:
    ranks, train, rows = distributed.get_world_size(), train_of(strategy, accumulate), []
    for name, expected in forecasts.items():
        plan = plan_of(backbone, name)
        trained = trained_part(plan, None)
        if strategy == "fsdp":
            way = sharded(plan, train, ranks, "gloo")
        else:
            real = Replicated.of(train).with_ranks(Ranks(rank, ranks))
            way = Parallel(ranks, partial(real.wrap, plan=plan), real.without_reduction)
        options = {**train.forecast_options(), "targets": plan.needs.targets, "parallel": way}
        # A thread of gloo may hold a message a moment longer than it is needed.
        costs = [measure(trained.module, trained.input, train.batch // ranks, **options) for _ in range(3)]
        found = figures(min(costs, key=lambda cost: cost.peak_bytes))
        if rank == 0:
            messages = "; ".join(
                f"{calls} {kind}, {size:,} B" + (f" ({' + '.join(f'{s:,}' for s in sizes)})" if kind == "all-reduce" else "")
                for kind, calls, size, sizes in found["messages"]
            )
            same = "equal" if found["messages"] == expected["messages"] else f"forecast {expected['messages']}"
            peaks = f"{expected['peak']:,} | {found['peak']:,}"
            rows.append(f"| {backbone} | {name} | {strategy} | {ranks} | {accumulate} | {peaks} | {same} | {messages} |\n")
    with out.open("a") as file:
        file.writelines(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--out", type=Path, required=True, help="where the table is written")
    parser.add_argument("--append", action="store_true", help="behind the rows that are there")
    options = parser.parse_args()
    about = "bytes of one step on rank 0, batch 12 over all ranks and micro-batches, gloo; least of three steps"
    named = (f"{what}, {how}" for what in ("peak", "messages") for how in ("forecast", "measured"))
    columns = ["backbone", "pass", "strategy", "ranks", "micro-batches", *named]
    if not options.append:
        head = f"`PYTHONPATH=. python tools/ranks_cost.py --out tools/tables/ranks_cost.md`: {about}\n\n| {' | '.join(columns)} |\n"
        options.out.write_text(head + "|---" * len(columns) + "|\n")
    for ranks in options.ranks:
        for backbone in BACKBONES:
            for strategy in ("ddp", "fsdp"):
                train, plans = train_of(strategy, options.accumulate), {name: plan_of(backbone, name) for name in PASSES}
                costs = {name: forecast_ranks(plan, train, ranks=ranks) for name, plan in plans.items()}
                forecasts = {name: figures(cost.phases[0].step) for name, cost in costs.items()}
                run_ranks(compare, backbone, strategy, options.accumulate, forecasts, options.out, ranks=ranks)


if __name__ == "__main__":
    main()
