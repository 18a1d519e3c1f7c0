"""Regions: the nodes of a module path, or of a run of paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from graphopt.errors import SelectError, did_you_mean
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations, parameters_of
from graphopt.ir.paths import containers, is_below, lineage


@dataclass(frozen=True)
class Region:
    """The nodes of one module path, or of a run of paths, in one graph.

    Attributes:
        name: `"layer1.0"`; a run reads `"features.0-2"`.
        paths: the module paths it is made of.
        kind: class name of the module; `"Conv2d unit"` for a run that starts with a `Conv2d`.
        nodes: in execution order.
        entries: activations from outside that feed it (input included). exits: activations inside that are used outside.
        closed: one activation in, one out.
        parameters: names of the parameters its nodes use, in order of use.
    """

    name: str
    paths: tuple[str, ...]
    kind: str
    nodes: tuple[Node, ...]
    entries: tuple[Node, ...]
    exits: tuple[Node, ...]
    closed: bool
    parameters: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Region({self.name!r}, {self.kind}, {len(self.nodes)} nodes)"

    def covers(self, other: Region) -> bool:
        """Whether every node of `other` is one of this region's."""
        return set(other.nodes) <= set(self.nodes)


def entries_and_exits(nodes: Iterable[Node], active: set[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Activations that come in from outside, and those that go out. Reading only the shape of an activation does not count as an exit."""
    nodes = tuple(nodes)
    members = set(nodes)
    entries = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in members and i in active)
    exits = tuple(n for n in nodes if n in active and any(u not in members and (u in active or u.op == "output") for u in n.users))
    return tuple(entries), exits


def region_at(graph: Graph, path: str) -> Region:
    """The region of one module path, or of a parameter that the graph reads itself (`cls_token`).

    Raises SelectError if nothing in the graph comes from there; names the nearest paths.
    """
    found = region_of(graph, (path,))
    if not found.nodes:
        raise SelectError(f"no part of the graph has the path {path!r}", fix=did_you_mean(path, graph.paths))
    return found


def region_of(graph: Graph, paths: tuple[str, ...]) -> Region:
    """The region of a run of paths, whatever it holds (empty where nothing comes from there)."""
    known = graph.cached(_known_regions)
    if paths not in known:
        known[paths] = _region_of(graph, paths)
    return known[paths]


def _known_regions(_: Graph) -> dict[tuple[str, ...], Region]:
    """Filled as regions are asked for."""
    return {}


def _region_of(graph: Graph, paths: tuple[str, ...]) -> Region:
    below = graph.cached(_nodes_below)
    nodes = tuple(sorted({n for p in paths for n in below.get(p, ())}, key=graph.order.__getitem__))
    entries, exits = entries_and_exits(nodes, activations(graph))
    name = paths[0] if len(paths) == 1 else f"{paths[0]}-{paths[-1].rpartition('.')[2]}"
    # What a pass reads here from elsewhere (a neighbour's weight in a mix) stays its owner's.
    own = (n for n in nodes if n.op != "get_attr" or "pass" not in n.meta or is_below(str(n.target), paths))
    closed = len(entries) == len(exits) == 1
    return Region(name, paths, _kind(graph, paths), nodes, entries, exits, closed, parameters_of(graph, own))


def _nodes_below(graph: Graph) -> dict[str, dict[Node, None]]:
    """The nodes at or below each path, in execution order."""
    below: dict[str, dict[Node, None]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        # A parameter lies where it is registered, too; but one that a pass reads for another region (a neighbour's weight in a mix)
        # lies only where it is read, or execution order would lose its meaning.
        own = node.op == "get_attr" and "pass" not in node.meta
        for path in {*lineage(node.meta["origin"].path), *(lineage(str(node.target)) if own else ())}:
            below.setdefault(path, {})[node] = None
    return below


def _kind(graph: Graph, paths: tuple[str, ...]) -> str:
    if len(paths) == 1:
        return graph.types.get(paths[0], "Parameter")
    weighted = graph.cached(_weighted)
    return f"{next((graph.types[p] for p in paths if p in weighted), graph.types.get(paths[0], ''))} unit"


def _weighted(graph: Graph) -> set[str]:
    """The paths of modules that hold parameters."""
    return {path for name, _ in graph.module.named_parameters(remove_duplicate=False) for path in containers(name)}
