"""A region as a module of its own, over copies of what it reads."""

from torch import fx
from torch.fx import Node

from graphopt.errors import PassError
from graphopt.ir.copying import Replace, copy_with
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute, storages, writes_in_place
from graphopt.ir.regions import Region


def extracted(graph: Graph, region: Region, replace: Replace | None = None) -> fx.GraphModule:
    """A closed region as a module from its one activation in, (N, ...), to its one activation out.

    Leaves and tensors are copies under the backbone's own paths, with `replace(tensor)` for each tensor (default: a copy); `graph` stays as
    it is. What the region reads that is made of parameters alone belongs to it. A region that writes into its input gets a copy of it.

    Raises PassError if it is not closed, or reads anything else from outside that depends on the network's input (a shape, say).
    """
    if not region.closed:
        raise PassError(
            f"{region.name} has {len(region.entries)} activations in and {len(region.exits)} out", fix="Name one with one of each"
        )
    entry, nodes = region.entries[0], _nodes_of(graph, region)
    body, copies = fx.Graph(), dict[Node, Node]()
    copies[entry] = body.placeholder("x")
    memory = storages(entry)
    if any(writes_in_place(graph.module, n) and storages(n) & memory for n in nodes):
        copies[entry] = body.call_method("clone", (copies[entry],))
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    body.output(copies[region.exits[0]])
    used = {str(n.target): attribute(graph.module, str(n.target)) for n in nodes if n.op in ("call_module", "get_attr")}
    shared = fx.GraphModule(used, body, region.kind.replace(" ", "") or "Region")
    copied: fx.GraphModule = copy_with(shared, replace)
    return copied


def _nodes_of(graph: Graph, region: Region) -> list[Node]:
    """The region's nodes, and those outside that they read and that depend on no input, in execution order."""
    entry, inside = region.entries[0], set(region.nodes)
    outside = ancestors(region.nodes, lambda n: n is not entry and n not in inside) - inside - {entry}
    if (fed := next((n for n in graph.nodes if n in outside and n.op == "placeholder"), None)) is not None:
        what = f"{region.name} reads something else of the input than the activation before it"
        raise PassError(what, where=str(fed), fix="Such a region cannot stand alone")
    return [n for n in graph.nodes if n in inside or n in outside]
