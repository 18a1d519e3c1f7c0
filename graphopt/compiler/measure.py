"""The cost model as the pipeline calls it: one training step of an emitted module, whole and per part of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from graphopt.compiler.emit import emit
from graphopt.compiler.pass_base import Effects, RuntimeNeeds
from graphopt.cost import Cost, forecast
from graphopt.ir.blocks import disjoint_parts
from graphopt.ir.graph import Graph

#: costs of an emitted module; gets the module, the flat graph it came from, and the effects so far
Measure = Callable[[nn.Module, Graph, tuple[Effects, ...]], Cost]


def measure_with(
    batch: int, *, optimizer: str = "sgd", optimizer_options: Mapping[str, Any] | None = None, amp: str | None = None
) -> Measure:
    """A `Measure` for steps of `batch` samples. Options as in `graphopt.cost.forecast`."""
    options: dict[str, Any] = {"optimizer": optimizer, "optimizer_options": optimizer_options, "amp": amp}

    def measure(module: nn.Module, graph: Graph, effects: tuple[Effects, ...]) -> Cost:
        needs = RuntimeNeeds()
        for effect in effects:
            needs = needs | effect.needs
        shape = graph.input
        if needs.features is not None:
            # Training runs on what lies behind the cut; parameters and buffers of the whole network stay in memory for evaluation.
            module = emit(graph, start=needs.features.node).train()
            shape = tuple(needs.features.node.meta["val"].shape[1:])
        return forecast(module, shape, batch, targets=needs.targets, per_block=disjoint_parts(graph), **options)

    return measure
