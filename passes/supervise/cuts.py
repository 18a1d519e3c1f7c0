"""Where a graph may be cut into gradient-isolated modules, and where to cut it.

A place is an activation that every path crosses, carries a batch of samples in its first dimension, and is not overwritten in place by what
comes next. Between two cuts there must be something to train. Cuts after blocks, after stages and by memory are chosen here and
in `balance`; explicit ones name regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from graphopt.errors import PassError, did_you_mean
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import parameters_of
from graphopt.ir.regions import Region, region_at
from graphopt.ir.shapes import SHAPE_BATCH


@dataclass(frozen=True)
class Place:
    """A possible cut: the activation, what people call it, and whether anything trains between it and the place before it.

    Attributes:
        label: the largest region that ends there ("layer1.14"), else the operation's path and node ("layer1.14 (add_14)").
    """

    node: fx.Node
    label: str
    weighted: bool


def places(graph: Graph) -> tuple[Place, ...]:
    """All possible cuts, in execution order. The last of them still has something to train behind it."""
    points = [n for n in cut_points(graph) if _usable(graph, n)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    named = _labels(graph, set(points))
    found: list[Place] = []
    start = -1
    for node in points:
        weighted = bool(parameters_of(graph, graph.nodes[start + 1 : order[node] + 1]))
        start = order[node]
        label = named.get(node) or f"{node.meta['origin'].path} ({node})".strip()
        found.append(Place(node, label, weighted))
    # Behind the last weights there is nothing left to supervise from.
    while found and not parameters_of(graph, graph.nodes[order[found[-1].node] + 1 :]):
        found.pop()
    return tuple(found)


def most_modules(found: Sequence[Place]) -> int:
    """How many modules the places allow, each with something to train."""
    return 1 + sum(p.weighted for p in found)


def evenly(graph: Graph, found: Sequence[Place], modules: int) -> tuple[Place, ...]:
    """K-1 cuts that leave each module about the same number of blocks; of places, where there are fewer blocks than modules."""
    demand(found, modules)
    at = {p.node: p for p in found}
    ends = [at.get(b.exits[0]) if len(b.exits) == 1 else None for b in find_blocks(graph)]
    usable = [p for p in ends[:-1] if p is not None]
    if len(usable) >= modules - 1:
        chosen: list[Place] = []
        for i in range(1, modules):
            wanted = i * len(ends) / modules
            # Blocks that do not end at a cut point (DenseNet's layers) leave the nearest that does.
            left = modules - 1 - i
            free = usable[len(chosen) and usable.index(chosen[-1]) + 1 : len(usable) - left]
            chosen.append(min(free, key=lambda p: abs(ends.index(p) + 1 - wanted)))
        return tuple(chosen)
    weighted = [p for p in found if p.weighted]
    return tuple(weighted[round(i * (len(weighted) + 1) / modules) - 1] for i in range(1, modules))


def by_stage(graph: Graph, found: Sequence[Place], modules: int | None) -> tuple[Place, ...]:
    """Cuts between stages, a patch merging going with the stage before it; all stages, or K runs of them.

    A stage is a run of blocks whose outputs have one shape.

    Raises:
        PassError: the backbone has no stages, or fewer than K.
    """
    blocks = [b for b in find_blocks(graph) if len(b.exits) == 1 and b.entries]
    shapes = [tuple(b.exits[0].meta["val"].shape) for b in blocks]
    at = {p.node: p for p in found}
    ends = []
    for i in range(1, len(blocks)):
        if shapes[i] != shapes[i - 1]:
            # A reduction inside the stage's first block leaves the block before as the end; one of its own lies before its entry.
            place = at.get(blocks[i].entries[0]) or at.get(blocks[i - 1].exits[0])
            if place is not None:
                ends.append(place)
    stages = len(ends) + 1
    wanted = stages if modules is None else modules
    if stages < 2:
        raise PassError("the blocks all have outputs of one shape: there are no stages", fix='Use modules = K with balance = "blocks"')
    if wanted > stages:
        raise PassError(f"there are {stages} stages, not {wanted}", fix=f'Use modules = {stages}, or balance = "blocks"')
    return tuple(ends[round(i * stages / wanted) - 1] for i in range(1, wanted))


def explicit(graph: Graph, found: Sequence[Place], paths: Sequence[str]) -> tuple[Place, ...]:
    """A cut after each region named.

    Raises:
        PassError: a region does not end at a possible cut, or two cuts leave nothing to train between them; names the nearest that do.
        SelectError: there is no such region.
    """
    at = {p.node: p for p in found}
    chosen: list[Place] = []
    for path in paths:
        region = named_region(graph, path)
        exits = region.exits or region.nodes[-1:]
        place = at.get(exits[-1]) if len(exits) == 1 else None
        if place is None:
            raise PassError(f"the graph cannot be cut after {path!r}: {_why_not(graph, exits)}", fix=_nearest(graph, found, exits[-1]))
        chosen.append(Place(place.node, path, place.weighted))
    order = {p.node: i for i, p in enumerate(found)}
    chosen.sort(key=lambda p: order[p.node])
    for one, other in pairwise(chosen):
        if not any(found[i].weighted for i in range(order[one.node] + 1, order[other.node] + 1)):
            raise PassError(
                f"there is nothing to train between the cuts after {one.label!r} and {other.label!r}",
                fix=_nearest(graph, found, other.node),
            )
    if not any(p.weighted for p in found[: order[chosen[0].node] + 1]):
        raise PassError(f"there is nothing to train before {chosen[0].label!r}", fix=_nearest(graph, found, chosen[0].node))
    return tuple(chosen)


def named_region(graph: Graph, name: str) -> Region:
    """The block or the module path of that name.

    Raises:
        SelectError: there is none; with near misses.
    """
    return next((b for b in find_blocks(graph) if b.name == name), None) or region_at(graph, name)


def demand(found: Sequence[Place], modules: int) -> None:
    most = most_modules(found)
    if most < 2:
        raise PassError(
            "there is no cut with something to train on both sides: the backbone cannot be divided",
            fix="graphopt inspect shows what the trace sees of it",
        )
    if modules > most:
        weighted = [p.label for p in found if p.weighted]
        shown = ", ".join(weighted[:12]) + (", ..." if len(weighted) > 12 else "")
        raise PassError(
            f"{modules} modules need {modules - 1} cuts, and the graph has {most - 1} with something to train between them",
            fix=f"Use modules = {most} or fewer. The cuts there are: after {shown or 'none'}",
        )


def _usable(graph: Graph, node: fx.Node) -> bool:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2 or value.shape[0] != SHAPE_BATCH:
        return False
    if graph.output in node.users:
        return False
    return _overwriter(graph, node) is None


def _overwriter(graph: Graph, node: fx.Node) -> fx.Node | None:
    """What writes into an activation, or into a view of it: on the other side of a cut that would change what is to be rebuilt."""
    for user in node.users:
        if _overwrites(graph, user):
            return user
        value = user.meta.get("val")
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == node.meta["val"].untyped_storage()._cdata:
            found = _overwriter(graph, user)
            if found is not None:
                return found
    return None


def _overwrites(graph: Graph, node: fx.Node) -> bool:
    """Whether an operation writes into its input."""
    if node.op == "call_module":
        return bool(getattr(graph.module.get_submodule(node.target), "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    name = getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or (name.startswith("i") and name in ("iadd", "imul", "isub", "itruediv"))


def _labels(graph: Graph, points: set[fx.Node]) -> dict[fx.Node, str]:
    """The largest region that ends at each point: blocks by their name, else the shortest path whose one exit it is."""
    members: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        parts = node.meta["origin"].path.split(".")
        for depth in range(1, len(parts) + 1):
            members.setdefault(".".join(parts[:depth]), []).append(node)
    labels: dict[fx.Node, str] = {}
    named = [(b.name, b.nodes) for b in find_blocks(graph)]
    for path, nodes in [*named, *sorted(members.items(), key=lambda item: item[0].count("."))]:
        inside = set(nodes)
        leaving = [n for n in nodes if isinstance(n.meta.get("val"), Tensor) and any(u not in inside for u in n.users)]
        if len(leaving) == 1 and leaving[0] in points:
            labels.setdefault(leaving[0], path)
    return labels


def _why_not(graph: Graph, exits: Sequence[fx.Node]) -> str:
    if len(exits) > 1:
        return f"it has {len(exits)} ways out"
    node = exits[0]
    if node not in cut_points(graph):
        return "other paths go around it"
    if graph.output in node.users:
        return "it is the output"
    if (writer := _overwriter(graph, node)) is not None:
        return f"{writer} overwrites its output in place"
    return "its output has no batch dimension in front, or nothing behind it trains"


def _nearest(graph: Graph, found: Sequence[Place], node: fx.Node) -> str:
    order = {n: i for i, n in enumerate(graph.nodes)}
    before = [p.label for p in found if order[p.node] < order[node]][-1:]
    after = [p.label for p in found if order[p.node] > order[node]][:1]
    nearest = [repr(label) for label in before + after]
    return f"The nearest cuts are after {' and '.join(nearest)}" if nearest else did_you_mean("", ()) or "There are no cuts"
