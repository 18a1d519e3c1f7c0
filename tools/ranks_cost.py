"""Forecast next to measurement: live bytes and messages of a step on 2 and 3 gloo ranks. Run with PYTHONPATH=. from the repository's root.

Writes tools/tables/ranks_cost.md.
"""

from collections.abc import Mapping
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

TABLE = Path(__file__).parent / "tables" / "ranks_cost.md"
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


def train_of(strategy: str) -> TrainSpec:
    return TrainSpec.model_validate({"epochs": 1, "batch": 12, "device": "cpu", "strategy": strategy})


def figures(cost: Cost) -> dict[str, Any]:
    return {"peak": cost.peak_bytes, "messages": [(m.name, m.calls, m.bytes, m.sizes) for m in cost.collectives]}


def compare(rank: int, backbone: str, strategy: str, forecasts: Mapping[str, dict[str, Any]]) -> None:
    ranks, train, rows = distributed.get_world_size(), train_of(strategy), []
    for name, expected in forecasts.items():
        plan = plan_of(backbone, name)
        trained = trained_part(plan, None)
        if strategy == "fsdp":
            way = sharded(plan, train, ranks, "gloo")
        else:
            real = Replicated.of(train).with_ranks(Ranks(rank, ranks))
            way = Parallel(ranks, lambda module, real=real, plan=plan: real.wrap(module, plan), real.without_reduction)
        options = {**train.forecast_options(), "targets": plan.needs.targets, "parallel": way}
        # A thread of gloo may hold a message a moment longer than it is needed.
        costs = [measure(trained.module, trained.input, train.micro_batch(ranks), **options) for _ in range(3)]
        found = figures(min(costs, key=lambda cost: cost.peak_bytes))
        if rank == 0:
            messages = "; ".join(
                f"{calls} {kind}, {size:,} B" + (f" ({' + '.join(f'{s:,}' for s in sizes)})" if kind == "all-reduce" else "")
                for kind, calls, size, sizes in found["messages"]
            )
            same = "equal" if found["messages"] == expected["messages"] else f"forecast {expected['messages']}"
            peaks = f"{expected['peak']:,} | {found['peak']:,}"
            rows.append(f"| {backbone} | {name} | {strategy} | {ranks} | {peaks} | {messages} | {same} |\n")
    with TABLE.open("a") as file:
        file.writelines(rows)


def main() -> None:
    head = "| backbone | pass | strategy | ranks | peak, forecast | peak, measured | messages, measured | messages, forecast |\n"
    TABLE.write_text(
        "`PYTHONPATH=. python tools/ranks_cost.py`: bytes of one step on rank 0, batch 12 over all ranks, gloo; least of three steps\n\n"
        + head
    )
    with TABLE.open("a") as file:
        file.write("|---|---|---|---|---|---|---|---|\n")
    for ranks in (2, 3):
        for backbone in BACKBONES:
            for strategy in ("ddp", "fsdp"):
                plans = {name: plan_of(backbone, name) for name in PASSES}
                costs = {name: forecast_ranks(plan, train_of(strategy), ranks=ranks) for name, plan in plans.items()}
                run_ranks(compare, backbone, strategy, {name: figures(c.phases[0].step) for name, c in costs.items()}, ranks=ranks)


if __name__ == "__main__":
    main()
