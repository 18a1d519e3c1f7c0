"""Regions that run again in the backward pass, as checkpointed sections of the graph that is being rewritten."""

from collections.abc import Sequence

from torch.fx import Node

from graphopt.compiler.pass_base import Effects, Status
from graphopt.cost.recomputation import Runs
from graphopt.errors import PassError
from graphopt.ir.editor import Editor
from graphopt.ir.flow import slice_around
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations
from graphopt.ir.regions import Region
from graphopt.ir.repeating import repeatable
from graphopt.runtime.body import Checkpointed, NoGrad


def recompute(edit: Editor, regions: Sequence[Region], runs: Runs) -> Effects:
    """Outlines each run of regions, with what lies between them, or the nodes of it that are named; says what became of each region.

    Regions that are not in `regions` are left out of their run. A region is left alone if it computes no activations,
    if it runs without a backward pass, or if what it reads is overwritten before it could read it again.

    Raises PassError if nothing computes activations.
    """
    effects, count, active = Effects(), 0, activations(edit.graph)
    by_name = {region.name: region for region in regions}
    for names, selected in runs:
        run = [by_name[name] for name in names if name in by_name]
        computing = [region for region in run if not active.isdisjoint(region.nodes)]
        for region in run:
            if region not in computing:
                effects.skip(region.name, "it computes no activations: there is nothing to recompute")
        if not computing:
            continue
        nodes = _nodes(edit.graph, run, selected)
        again = repeatable(edit, nodes)
        if again is None:
            for region in run:
                effects.skip(region.name, "its input is overwritten in place where others read it: it cannot run from it again")
            continue
        name = f"checkpoint_{count + 1}"
        sections = edit.outline(again, Checkpointed, name, outside=NoGrad, only=lambda piece: not active.isdisjoint(piece))
        count += len(sections)
        for region in computing:
            if sections:
                effects.mark(region.name, Status.CHECKPOINTED)
            else:
                effects.skip(region.name, "it runs without a backward pass already: nothing is saved there")
    if not count and not effects.diagnostics:
        raise PassError("nothing that is selected computes activations")
    effects.figures["segments"] = count
    return effects


def _nodes(graph: Graph, run: Sequence[Region], selected: Sequence[str]) -> tuple[Node, ...]:
    """What runs again together: between the first and the last of the selected nodes that are left; without any, the regions."""
    if selected:
        names = set(selected)
        return slice_around(graph, (n for n in graph.nodes if n.name in names))
    return run[0].nodes if len(run) == 1 else slice_around(graph, (n for region in run for n in region.nodes))
