"""Where a prefix may end: cut points by the names users give them, the stretches between them, and the cut itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import PassError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import parameters_of
from graphopt.ir.regions import Region, region_at
from graphopt.ir.section import Section
from graphopt.ir.select import select
from graphopt.ir.shapes import SHAPE_BATCH, propagate_shapes
from graphopt.passes.drop.resting import by_mode, is_random, resting
from graphopt.runtime.body import NoGrad

SECTION = "dropped_prefix"


# -- finding ------------------------------------------------------------------------------------------------------------------------
def end_of(region: Region, order: dict[fx.Node, int]) -> fx.Node | None:
    """The last activation that leaves a region."""
    return max(region.exits, key=order.__getitem__, default=None)


def named_cut(graph: Graph, path: str) -> fx.Node:
    """The cut at the end of the part that `path` names.

    Raises:
        SelectError: nothing has that path.
        PassError: the part does not end at a cut point; names the nearest that do. Or nothing trainable lies behind it.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    ends = [e for r in select(path, graph) if (e := end_of(r, order)) is not None]
    cuts = [n for n in cut_points(graph) if per_sample(n)]
    end = max(ends, key=order.__getitem__, default=None)
    if end not in cuts:
        place = order[end] if end is not None else len(order)
        earlier = (_name_of(graph, n, order) for n in reversed(cuts) if order[n] < place)
        later = (_name_of(graph, n, order) for n in cuts if order[n] > place and trains_behind(graph, n))
        names = [name for names in (earlier, later) if (name := next(filter(None, names), None))]
        raise PassError(
            f"what comes before the end of {path!r} is not closed: other paths lead past it, so no single activation can stand for it",
            where="upto",
            fix=f"The nearest parts that end at a cut point: {' and '.join(map(repr, names))}" if names else None,
        )
    assert end is not None
    if not trains_behind(graph, end):
        useful = next(filter(None, (_name_of(graph, n, order) for n in reversed(cuts) if trains_behind(graph, n))), None)
        raise PassError(
            f"nothing that trains is left behind {path!r}: the head itself cannot be dropped",
            where="upto",
            fix=f"End earlier, for instance at {useful!r}" if useful else "No part of this backbone ends where one could be dropped",
        )
    return end


def block_cuts(graph: Graph) -> dict[str, fx.Node]:
    """The blocks that end at a cut point with something trainable behind it, in execution order, with their cuts."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    cuts = {n for n in cut_points(graph) if per_sample(n)}
    ends = {block.name: end_of(block, order) for block in find_blocks(graph)}
    return {name: end for name, end in ends.items() if end in cuts and end is not None and trains_behind(graph, end)}


def per_sample(node: fx.Node) -> bool:
    """Whether an activation's first dimension is the batch, so that a sample's row can be kept."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == SHAPE_BATCH and value.is_floating_point()


def before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from; the input aside."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            stack += node.all_input_nodes
    return found


def trains_behind(graph: Graph, cut: fx.Node) -> bool:
    """Whether a trainable parameter is read by what comes after the cut."""
    prefix = before([cut])
    own = {id(graph.module.get_parameter(n)) for n in parameters_of(graph, prefix)}
    behind = (n for n in graph.nodes if n not in prefix)
    rest = (graph.module.get_parameter(n) for n in parameters_of(graph, behind))
    return any(p.requires_grad and id(p) not in own for p in rest)


def stretches(graph: Graph, cuts: dict[str, fx.Node]) -> tuple[Region, ...]:
    """The graph up to the last cut, divided at the cuts. Each stretch has the name of the part it ends with, stem and all."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    found: list[Region] = []
    taken: set[fx.Node] = set()
    entry = graph.placeholder
    for name, cut in sorted(cuts.items(), key=lambda item: order[item[1]]):
        nodes = tuple(sorted(before([cut]) - taken, key=order.__getitem__))
        if not nodes:
            continue
        taken |= set(nodes)
        paths = tuple(dict.fromkeys(n.meta["origin"].path for n in nodes if n.op == "call_module")) or (name,)
        found.append(Region(name, paths, "prefix", nodes, (entry,), (cut,), True, parameters_of(graph, nodes)))
        entry = cut
    return tuple(found)


def _name_of(graph: Graph, cut: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """What a user would write for a cut: the outermost path that ends there, or the block; None where nothing is named so."""
    parts = cut.meta["origin"].path.split(".")
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    named = (path for path in paths if path and end_of(region_at(graph, path), order) is cut)
    return next(named, None) or next((b.name for b in find_blocks(graph) if end_of(b, order) is cut), None)


# -- cutting ------------------------------------------------------------------------------------------------------------------------
def cut_off(graph: Graph, cuts: Sequence[fx.Node], *, by: str) -> dict[str, Any]:
    """Takes everything up to the last of `cuts` out of training: no gradients, eval semantics, one section under `no_grad`.

    The graph can afterwards be taken apart at each of the cuts, so that features of a later one can be computed from those of an earlier.
    Returns figures for the report.

    Raises:
        PassError: a parameter is read on both sides, the prefix draws random numbers in eval mode too, or a section of another pass that
            has a loss of its own lies in it.
    """
    prefix = before([cuts[-1]])
    nodes = [n for n in graph.nodes if n in prefix]
    _demand_apart(graph, nodes, by)
    names = parameters_of(graph, nodes)
    aliases = {id(graph.module.get_parameter(n)) for n in names}
    for parameter in graph.module.parameters():
        if id(parameter) in aliases:
            parameter.requires_grad_(False)
    rested = _rest(graph, nodes, by)
    for cut in cuts:
        _recompute_scalars(graph, cut, by)
    prefix = before([cuts[-1]])
    graph.add_section(Section(SECTION, tuple(n for n in graph.nodes if n in prefix), NoGrad, by))
    return {"prefix_nodes": len(nodes), "prefix_parameters": sum(graph.module.get_parameter(n).numel() for n in names), "rested": rested}


def _demand_apart(graph: Graph, nodes: Sequence[fx.Node], by: str) -> None:
    inside = set(nodes)
    rest = [n for n in graph.nodes if n not in inside]
    theirs = {id(graph.module.get_parameter(n)): n for n in parameters_of(graph, rest)}
    for name in parameters_of(graph, nodes):
        if (other := theirs.get(id(graph.module.get_parameter(name)))) is not None:
            raise PassError(
                f"{name} is read before the cut and behind it (as {other}): it cannot be dropped and train",
                where=name,
                fix="End the prefix where nothing is shared over it",
            )
    for node in nodes:
        if node.op == "call_function" and is_random(node.target):
            raise PassError("the prefix draws random numbers: what it computes cannot be kept", where=f"node {node}")
    for section in graph.sections:
        if section.target and inside & set(section.nodes):
            raise PassError(
                f"{section.by} trains a part of the prefix by a loss of its own: it cannot be dropped and train",
                where=f"passes {section.by} and {by}",
                fix="Drop less, or leave one of the two passes out",
            )


def _rest(graph: Graph, nodes: Sequence[fx.Node], by: str) -> int:
    """Puts leaves that behave by mode to rest. One that is called behind the cut as well gets a resting twin instead."""
    inside = set(nodes)
    count = 0
    for node in nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        module = graph.module.get_submodule(target)
        if not by_mode(module):
            continue
        form = resting(module)
        if any(n.op == "call_module" and n.target == target and n not in inside for n in graph.nodes):
            # It holds no parameter (else it would be read on both sides), so no state-dict key moves.
            target = _twin(graph, target, form)
            node.target = target
        else:
            graph.replace_module(target, form)
        node.meta["by"] = by
        count += 1
    return count


def _twin(graph: Graph, target: str, form: nn.Module) -> str:
    if next(form.buffers(), None) is not None:
        raise PassError(f"{target} is called before the cut and behind it, and has state", where=target, fix="End the prefix elsewhere")
    if not hasattr(graph.module, "resting"):
        graph.module.add_module("resting", nn.Module())
    name = target.replace(".", "_")
    graph.module.get_submodule("resting").add_module(name, form)
    return f"resting.{name}"


def _recompute_scalars(graph: Graph, cut: fx.Node, by: str) -> None:
    """Numbers that shape arithmetic carries over the cut are worked out behind it: constants, or multiples of the batch."""
    behind, from_input = _after(graph, cut), _after(graph, graph.placeholder)
    read = dict.fromkeys(i for n in graph.nodes if n in behind for i in n.all_input_nodes)
    crossing = [n for n in read if n is not cut and n not in behind and (n in from_input or n is graph.placeholder)]
    if not crossing:
        return
    twin = copy.deepcopy(graph.module)
    propagate_shapes(twin, graph.input, SHAPE_BATCH + 1)
    larger = {n.name: n.meta["val"] for n in twin.graph.nodes}
    with graph.fx.inserting_after(cut):
        batch = graph.fx.call_method("size", (cut, 0))
    batch.meta = {"origin": cut.meta["origin"], "by": by, "val": SHAPE_BATCH}
    for node in crossing:
        if isinstance(node.meta["val"], torch.Tensor):
            raise PassError(f"besides the cut, {node} leads from the prefix to what is behind", where=f"node {node}")
        _replace_scalar(graph, node, node.meta["val"], larger[node.name], batch, behind, by)


def _after(graph: Graph, start: fx.Node) -> set[fx.Node]:
    """Everything computed from `start`, itself left out."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if any(i is start or i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _replace_scalar(graph: Graph, node: fx.Node, small: Any, large: Any, batch: fx.Node, behind: set[fx.Node], by: str) -> None:
    at = batch

    def value(a: Any, b: Any) -> Any:
        nonlocal at
        if isinstance(a, tuple | list):
            return type(a)(value(x, y) for x, y in zip(a, b, strict=True)) if type(a) in (tuple, list) else tuple(map(value, a, b))
        if a == b or not isinstance(a, int):
            return a
        factor = a // SHAPE_BATCH
        if factor * SHAPE_BATCH != a or factor * (SHAPE_BATCH + 1) != b:
            raise PassError("a number that depends on the batch crosses the cut, and is no multiple of it", where=f"node {node}")
        if factor == 1:
            return batch
        with graph.fx.inserting_after(at):
            at = graph.fx.call_function(_mul, (batch, factor))
        at.meta = {"origin": node.meta["origin"], "by": by, "val": SHAPE_BATCH * factor}
        return at

    new = value(small, large)
    for user in list(node.users):
        if user not in behind:
            continue
        user.args, user.kwargs = fx.node.map_aggregate(  # type: ignore[assignment]
            (user.args, user.kwargs), lambda a: new if a is node else a
        )


def _mul(a: int, b: int) -> int:
    return a * b


def bytes_per_sample(cut: fx.Node, dtype: torch.dtype) -> int:
    """Bytes of one sample's features in `dtype`."""
    return int(cut.meta["val"][0].numel()) * dtype.itemsize
