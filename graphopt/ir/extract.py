"""A region as a module of its own, over copies of what it reads."""

from torch import fx
from torch.fx import Node

from graphopt.errors import PassError
from graphopt.ir.copying import Replace, copy_node, copy_with
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import attribute, storages, writes_in_place
from graphopt.ir.regions import Region


def extracted(graph: Graph, region: Region, replace: Replace | None = None) -> fx.GraphModule:
    """A closed region as a module from its one activation in, (N, ...), to its one activation out.

    Leaves and tensors are copies under the backbone's own paths, with `replace(tensor)` for each tensor (default: a copy); `graph` stays as
    it is. What the region reads that is made of parameters alone belongs to it. A region that writes into its input gets a copy of it.

    Raises PassError if it cannot stand alone.
    """
    if not stands_alone(region):
        counts = f"{len(region.entries)} activations in and {len(region.exits)} out"
        what = f"{region.name} has {counts}, or reads a number that depends on the network's input"
        raise PassError(what, fix="Choose a region with one activation in and one out, which reads nothing else")
    inside = {*region.nodes, *_read_outside(region)}
    entry, nodes = region.entries[0], [n for n in graph.nodes if n in inside]
    body, copies = fx.Graph(), dict[Node, Node]()
    copies[entry] = body.placeholder("x")
    memory = storages(entry)
    if any(writes_in_place(graph.module, n) and storages(n) & memory for n in nodes):
        copies[entry] = body.call_method("clone", (copies[entry],))
    for node in nodes:
        copies[node] = copy_node(body, node, copies)
        copies[node].meta = {}
    body.output(copies[region.exits[0]])
    used = {str(n.target): attribute(graph.module, str(n.target)) for n in nodes if n.op in ("call_module", "get_attr")}
    shared = fx.GraphModule(used, body, region.kind.replace(" ", "") or "Region")
    copied: fx.GraphModule = copy_with(shared, replace)
    return copied


def stands_alone(region: Region) -> bool:
    """Whether a region is closed, and reads nothing else from outside that depends on the network's input (the batch's size, say)."""
    return region.closed and not any(n.op == "placeholder" for n in _read_outside(region))


def _read_outside(region: Region) -> set[Node]:
    """What the nodes of a closed region read from outside but for its entry, and all that leads there."""
    entry, inside = region.entries[0], set(region.nodes)
    return ancestors(region.nodes, lambda n: n is not entry and n not in inside) - inside
