"""A plan on a graph that is traced already, so that a script that tries many passes traces once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from graphopt import Graph, Pass, Plan
from graphopt.compiler.pass_base import PassInstance
from graphopt.compiler.pipeline import Verify, match_all
from graphopt.compiler.plan import Source, compile_phase
from graphopt.compiler.sizes import Sizes


def plan_on(backbone: nn.Module, graph: Graph, passes: Sequence[Pass], *, name: str = "", batch: int = 2, verify: Verify = "off") -> Plan:
    """Passes applied to a traced backbone, without costs."""
    matched = match_all(graph, [PassInstance(value, index) for index, value in enumerate(passes)])
    sizes = Sizes(backbone, graph, matched, compare=False)
    source = Source(backbone=backbone, base=graph, matched=matched, sizes=sizes, name=name, digest="", batch=batch)
    return compile_phase(source, verify=verify, costs=False)
