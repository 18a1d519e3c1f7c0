"""A graph as a chain of parts: where it can be cut, and which cuts to take.

A graph can be cut at an activation that every path crosses, that has the samples in its first dimension, and that no later node overwrites
in place. Every part must have parameters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.fx import Node

from graphopt.errors import PassError, SelectError, did_you_mean, listed
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import overwriter, parameters_read
from graphopt.ir.regions import Region, region_at, region_of
from graphopt.ir.shapes import SHAPE_BATCH


@dataclass(frozen=True)
class CutCandidate:
    """An activation after which a graph can be cut, and whether there are parameters between the candidate before it and this one.

    Its label is the largest region that ends there ("layer1.14"), else the operation's path and node ("layer1.14 (add_14)").
    """

    node: Node
    label: str
    has_parameters: bool


def cut_candidates(graph: Graph) -> tuple[CutCandidate, ...]:
    """All possible cuts, in execution order. There are parameters after each of them."""
    return graph.cached(_cut_candidates)


def _cut_candidates(graph: Graph) -> tuple[CutCandidate, ...]:
    points = [n for n in cut_points(graph) if _can_cut_after(graph, n)]
    labels = _labels(graph, set(points))
    ends = [graph.order[n] + 1 for n in points]
    found = [
        CutCandidate(node, labels.get(node) or f"{node.meta['origin'].path} ({node})".strip(), _have_parameters(graph, graph.nodes[a:b]))
        for node, (a, b) in zip(points, pairwise([0, *ends]), strict=True)
    ]
    while found and not _have_parameters(graph, graph.nodes[ends[len(found) - 1] :]):
        found.pop()
    return tuple(found)


def most_parts(candidates: Sequence[CutCandidate]) -> int:
    """The largest number of parts, each with parameters, that the candidates allow."""
    return 1 + sum(c.has_parameters for c in candidates)


def require_parts(candidates: Sequence[CutCandidate], parts: int) -> None:
    """Checks that a chain can have so many parts. Raises PassError if it cannot; lists the cuts that there are."""
    most = most_parts(candidates)
    if most < 2:
        what = "no cut has parameters on both sides: the backbone cannot be divided"
        raise PassError(what, fix="graphopt inspect shows what the trace sees of it")
    if parts > most:
        shown = listed((c.label for c in candidates if c.has_parameters), 12)
        what = f"{parts} parts need {parts - 1} cuts, and the graph has {most - 1} with parameters between them"
        raise PassError(what, fix=f"Ask for {most} or fewer. The possible cuts are after {shown}")


def evenly(graph: Graph, candidates: Sequence[CutCandidate], parts: int) -> tuple[CutCandidate, ...]:
    """Cuts that give each part about as many blocks; as many candidates, where there are too few blocks.

    Raises PassError if there are too few candidates.
    """
    require_parts(candidates, parts)
    at = {c.node: c for c in candidates}
    blocks = find_blocks(graph)
    # Not every block ends at a candidate (DenseNet's layers do not): each cut takes the nearest that is left.
    ends = [(i, at[b.exits[0]]) for i, b in enumerate(blocks[:-1], start=1) if len(b.exits) == 1 and b.exits[0] in at]
    if len(ends) >= parts - 1:
        chosen: list[CutCandidate] = []
        start = 0
        for number in range(1, parts):
            free = range(start, len(ends) - (parts - 1 - number))
            nearest = min(free, key=lambda i: abs(ends[i][0] - number * len(blocks) / parts))
            chosen.append(ends[nearest][1])
            start = nearest + 1
        return tuple(chosen)
    weighted = [c for c in candidates if c.has_parameters]
    return tuple(weighted[round(i * (len(weighted) + 1) / parts) - 1] for i in range(1, parts))


def by_stage(graph: Graph, candidates: Sequence[CutCandidate], parts: int | None) -> tuple[CutCandidate, ...]:
    """Cuts between stages, a patch merging going with the stage before it; between all of them, or between `parts` runs of them.

    A stage is a run of blocks whose outputs have one shape. Raises PassError if the backbone has no stages, or too few.
    """
    blocks = [b for b in find_blocks(graph) if len(b.exits) == 1 and b.entries]
    at = {c.node: c for c in candidates}
    ends = []
    for before, block in pairwise(blocks):
        if block.exits[0].meta["val"].shape != before.exits[0].meta["val"].shape:
            # A reduction inside the stage's first block leaves the block before as the end; one of its own lies before its entry.
            candidate = at.get(block.entries[0]) or at.get(before.exits[0])
            if candidate is not None:
                ends.append(candidate)
    stages = len(ends) + 1
    wanted = stages if parts is None else parts
    if stages < 2:
        raise PassError("the blocks all have outputs of one shape: there are no stages", fix="Divide it by blocks or by memory")
    if wanted > stages:
        raise PassError(f"there are {stages} stages, not {wanted}", fix=f"Ask for {stages} or fewer, or divide it by blocks")
    return tuple(ends[round(i * stages / wanted) - 1] for i in range(1, wanted))


def explicit(graph: Graph, candidates: Sequence[CutCandidate], names: Iterable[str]) -> tuple[CutCandidate, ...]:
    """A cut after each region named; a candidate's label is a name too.

    Raises SelectError if there is no such region, PassError if the graph cannot be cut after it, or a part would have no parameters.
    """
    chosen = sorted((_candidate_after(graph, candidates, name) for name in names), key=lambda c: graph.order[c.node])
    position = {c.node: i for i, c in enumerate(candidates)}
    start = 0
    for number, cut in enumerate(chosen):
        end = position[cut.node] + 1
        if not any(c.has_parameters for c in candidates[start:end]):
            where = f"between the cuts after {chosen[number - 1].label!r} and {cut.label!r}" if number else f"before {cut.label!r}"
            raise PassError(f"there is nothing to train {where}", fix=_nearest(graph, candidates, cut.node))
        start = end
    return tuple(chosen)


def named_region(graph: Graph, name: str) -> Region:
    """The block or the module path of that name. Raises SelectError if there is none; with near misses."""
    return next((b for b in find_blocks(graph) if b.name == name), None) or region_at(graph, name)


def _candidate_after(graph: Graph, candidates: Sequence[CutCandidate], name: str) -> CutCandidate:
    for candidate in candidates:
        if candidate.label == name:
            return candidate
    try:
        region = named_region(graph, name)
    except SelectError as error:
        near = did_you_mean(name, (*(c.label for c in candidates), *graph.paths))
        raise SelectError(error.what, where=error.where, fix=near) from error
    exits = region.exits or region.nodes[-1:]
    found = next((c for c in candidates if exits == (c.node,)), None)
    if found is None:
        what = f"the graph cannot be cut after {name!r}: {_why_not(graph, exits)}"
        raise PassError(what, fix=_nearest(graph, candidates, exits[-1]))
    return CutCandidate(found.node, name, found.has_parameters)


def _can_cut_after(graph: Graph, node: Node) -> bool:
    value = node.meta["val"]
    samples = isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[0] == SHAPE_BATCH
    return samples and graph.output not in node.users and overwriter(graph, node) is None


def _have_parameters(graph: Graph, nodes: Iterable[Node]) -> bool:
    return any(True for node in nodes for _ in parameters_read(graph.module, node))


def _labels(graph: Graph, points: set[Node]) -> dict[Node, str]:
    """The largest region that ends at each point: blocks by their name, else the shortest path whose one exit it is."""
    labels: dict[Node, str] = {}
    paths = sorted(graph.paths, key=lambda p: p.count("."))
    for region in (*find_blocks(graph), *(region_of(graph, (p,)) for p in paths)):
        if len(region.exits) == 1 and region.exits[0] in points:
            labels.setdefault(region.exits[0], region.name)
    return labels


def _why_not(graph: Graph, exits: Sequence[Node]) -> str:
    if len(exits) > 1:
        return f"{len(exits)} of its activations are used outside"
    node = exits[0]
    if node not in cut_points(graph):
        return "other paths go around it"
    if graph.output in node.users:
        return "it is the output"
    if (writer := overwriter(graph, node)) is not None:
        return f"{writer} overwrites its output in place"
    return "its output has no batch dimension in front, or there are no parameters after it"


def _nearest(graph: Graph, candidates: Sequence[CutCandidate], node: Node) -> str:
    before = [c.label for c in candidates if graph.order[c.node] < graph.order[node]][-1:]
    after = [c.label for c in candidates if graph.order[c.node] > graph.order[node]][:1]
    return f"The nearest cuts are after {' and '.join(map(repr, before + after))}" if before or after else "There are no cuts"
