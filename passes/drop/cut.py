"""Where a prefix can end: cut points by the names that users give them, and the prefix of each."""

from collections.abc import Iterable, Mapping

import torch
from torch.fx import Node

from graphopt import Graph, PassError, Region, select
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import ancestors, cut_points
from graphopt.ir.nodes import parameters_of, parameters_read, storages, writes_in_place
from graphopt.ir.paths import lineage
from graphopt.ir.regions import region_at
from graphopt.ir.shapes import SHAPE_BATCH


def possible_cuts(graph: Graph) -> tuple[Node, ...]:
    """Cut points whose first dimension is the batch, so that each sample's features can be stored; in execution order."""
    values = ((n, n.meta["val"]) for n in cut_points(graph))
    return tuple(n for n, value in values if value.shape[:1] == (SHAPE_BATCH,) and value.is_floating_point())


def prefix_of(graph: Graph, cut: Node) -> tuple[Node, ...]:
    """What computes a cut, itself included, and what writes into memory read on the way; in execution order, without the input."""
    before = ancestors([cut])
    writers = [n for n in graph.nodes[: graph.order[cut]] if n not in before and writes_in_place(graph.module, n)]
    if writers:
        read = {memory for n in before for memory in storages(n)}
        before |= ancestors(n for n in writers if storages(n) & read)
    return tuple(n for n in graph.nodes if n in before and n.op != "placeholder")


def trains_after(graph: Graph, cut: Node) -> bool:
    """Whether what comes after a cut reads a trainable parameter that its prefix does not."""
    prefix = set(prefix_of(graph, cut))
    own = {id(p) for n in prefix for _, p in parameters_read(graph.module, n)}
    read = (p for n in graph.nodes if n not in prefix for _, p in parameters_read(graph.module, n))
    return any(p.requires_grad and id(p) not in own for p in read)


def named_cut(graph: Graph, path: str) -> Node:
    """The cut at the end of the part of the backbone that `path` names.

    Raises:
        SelectError: nothing has that path.
        PassError: as `check_cut`.
    """
    ends = [end for region in select(path, graph) if (end := _end_of(graph, region)) is not None]
    return check_cut(graph, max(ends, key=graph.order.__getitem__, default=None), path)


def check_cut(graph: Graph, cut: Node | None, name: str) -> Node:
    """Checks that a prefix can end at an activation, which is the end of the part called `name`.

    Raises:
        PassError: it is no cut point, or nothing trainable comes after it; names the nearest parts where a prefix can end.
    """
    cuts = possible_cuts(graph)
    if cut is None or cut not in cuts:
        position = len(graph.nodes) if cut is None else graph.order[cut]
        earlier = _first_name(graph, (n for n in reversed(cuts) if graph.order[n] < position))
        later = _first_name(graph, (n for n in cuts if graph.order[n] > position and trains_after(graph, n)))
        names = " and ".join(repr(n) for n in (earlier, later) if n)
        raise PassError(
            f"the prefix up to {name!r} is not closed: other paths lead past its end, so no single activation can replace it",
            where="upto",
            fix=f"The nearest parts that end at a cut point: {names}" if names else None,
        )
    if not trains_after(graph, cut):
        usable = _first_name(graph, (n for n in reversed(cuts) if trains_after(graph, n)))
        raise PassError(
            f"nothing trainable is left after {name!r}: the head itself cannot be dropped",
            where="upto",
            fix=f"End the prefix earlier, for instance at {usable!r}" if usable else "No part of this backbone can be dropped",
        )
    return cut


def block_cuts(graph: Graph) -> dict[str, Node]:
    """The blocks that end at a cut point with something trainable after it, in execution order, with their cuts."""
    cuts = set(possible_cuts(graph))
    ends = {block.name: _end_of(graph, block) for block in find_blocks(graph)}
    return {name: end for name, end in ends.items() if end is not None and end in cuts and trains_after(graph, end)}


def parts_between(graph: Graph, cuts: Mapping[str, Node]) -> tuple[Region, ...]:
    """The graph up to the last cut, divided at the cuts. Each part has the name of its cut; the first one includes the stem."""
    found: list[Region] = []
    taken: set[Node] = set()
    entry = graph.placeholder
    for name, cut in sorted(cuts.items(), key=lambda item: graph.order[item[1]]):
        nodes = tuple(n for n in prefix_of(graph, cut) if n not in taken)
        if not nodes:
            continue
        taken.update(nodes)
        paths = tuple(dict.fromkeys(n.meta["origin"].path for n in nodes if n.op == "call_module")) or (name,)
        found.append(Region(name, paths, "prefix", nodes, (entry,), (cut,), True, parameters_of(graph, nodes)))
        entry = cut
    return tuple(found)


def bytes_per_sample(cut: Node, dtype: str) -> int:
    """Bytes of one sample's features in a dtype of torch, by its name."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return int(cut.meta["val"][0].numel()) * torch_dtype.itemsize


def _end_of(graph: Graph, region: Region) -> Node | None:
    """The last activation that leaves a region."""
    return max(region.exits, key=graph.order.__getitem__, default=None)


def _first_name(graph: Graph, cuts: Iterable[Node]) -> str | None:
    """The name of the first of some cuts that has one: the outermost path that ends there, or the block."""
    for cut in cuts:
        paths = [p for p in lineage(cut.meta["origin"].path) if p]
        regions = (*(region_at(graph, p) for p in paths), *find_blocks(graph))
        name = next((r.name for r in regions if _end_of(graph, r) is cut), None)
        if name is not None:
            return name
    return None
