"""The cost of one training step of an emitted module, whole and per part of the backbone."""

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import nn

from graphopt.compiler.emit import emit
from graphopt.compiler.pass_base import Effects, RuntimeNeeds
from graphopt.cost import Cost, StepOptions, forecast
from graphopt.ir.blocks import disjoint_parts
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import input_of

#: from an emitted module, the flat graph it came from, and the effects of the passes so far, to its cost
Measure = Callable[[nn.Module, Graph, Sequence[Effects]], Cost]


def measure_with(batch: int, **options: Unpack[StepOptions]) -> Measure:
    """A `Measure` for steps of `batch` samples."""

    def measure(module: nn.Module, graph: Graph, effects: Sequence[Effects]) -> Cost:
        needs, shape = RuntimeNeeds.of(effects), graph.input
        if needs.features is not None:
            # Only what follows the cut is trained; parameters and buffers of the whole network stay in memory for evaluation.
            suffix = emit(graph, start=needs.features.node)
            module, shape = suffix.train(), input_of(suffix)
        step: StepOptions = {**options, "targets": needs.targets}
        return forecast(module, shape, batch, per_block=disjoint_parts(graph), **step)

    return measure
