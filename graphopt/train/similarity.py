"""How alike images are to a region of the network, and how far that has changed since the epoch before.

Egeria (Wang et al., EuroSys 2023, arXiv 2201.06227) freezes a layer once its outputs stop moving away from those of a reference, an earlier
state of the same network, by the similarity-preserving loss of Tung and Mori (ICCV 2019, arXiv 1907.09682). That loss
compares two matrices of N x N similarities. With the same N images in every epoch, those of the epoch before are all that is kept of the
reference: its weights are not, and it need not run again.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphopt.compiler.plan import Plan
from graphopt.errors import SelectError
from graphopt.ir.partition import named_region

#: images that regions are compared on
IMAGES = 32


def similarities(plan: Plan, images: Tensor) -> dict[str, Tensor]:
    """For each region of `plan.compared`, how alike its outputs for any two of `images` are: (N, N), float64, rows of length 1, on the CPU.

    The network runs in eval mode, once, without gradients, and is left in the mode that it was in. Regions that the phase does not have
    any more are left out.
    """
    training = plan.module.training
    plan.module.eval()
    try:
        with torch.no_grad():
            outputs = _Outputs(plan, plan.compared)
            outputs.run(images)
    finally:
        plan.module.train(training)
    return outputs.found


def distance(one: Tensor, other: Tensor) -> float:
    """The similarity-preserving loss of two matrices of N x N similarities: the mean of the squares of their differences."""
    return float((one - other).square().mean())


class _Outputs(fx.Interpreter):
    """Runs a plan's flat graph, and takes the similarities of what its regions give."""

    def __init__(self, plan: Plan, regions: Iterable[str]) -> None:
        super().__init__(plan.graph.module)
        self.found: dict[str, Tensor] = {}
        self._wanted: dict[fx.Node, list[str]] = {}
        for name in regions:
            try:
                region = named_region(plan.graph, name)
            except SelectError:
                continue
            self._wanted.setdefault((region.exits or region.nodes)[-1], []).append(name)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted and isinstance(value, Tensor):
            self.found |= dict.fromkeys(self._wanted[n], _similarities(value))
        return value


def _similarities(output: Tensor) -> Tensor:
    rows = output.flatten(1).to("cpu", torch.float64)
    return F.normalize(rows @ rows.T, dim=1)


def moved(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """The distance of each region from what it was; infinite where that is not known."""
    return {name: distance(before[name], value) if name in before else math.inf for name, value in now.items()}
