"""Dropping a prefix: where it can end, by the names that users give; and what takes it out of training.

A dropped prefix has no gradients and eval semantics, and nothing but its output is read by what comes after.
"""

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from graphopt import Editor, Graph, PassError, Region, select
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import ancestors, cut_points, descendants
from graphopt.ir.nodes import activations, parameters_of, parameters_read, storages, writes_in_place
from graphopt.ir.paths import is_below, lineage
from graphopt.ir.regions import region_at
from graphopt.ir.shapes import SHAPE_BATCH, propagate_shapes
from graphopt.ir.shifts import Croppable, croppable
from graphopt.runtime.body import NoGrad
from graphopt.runtime.by_mode import always_eval, depends_on_mode, is_random


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
    """The cut at the end of the part of the backbone that `path` names; raises what `select` and `check_cut` raise."""
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
        earlier = _first_name(graph, (n for n in reversed(cuts) if graph.order[n] < position and trains_after(graph, n)))
        later = _first_name(graph, (n for n in cuts if graph.order[n] > position and trains_after(graph, n)))
        names = " and ".join(repr(n) for n in (earlier, later) if n)
        what = f"the prefix up to {name!r} is not closed: other paths lead past its end, so no single activation can replace it"
        raise PassError(what, where="upto", fix=f"The nearest parts that end at a cut point: {names}" if names else None)
    if not trains_after(graph, cut):
        usable = _first_name(graph, (n for n in reversed(cuts) if trains_after(graph, n)))
        fix = f"End the prefix earlier, for instance at {usable!r}" if usable else "No part of this backbone can be dropped"
        raise PassError(f"nothing trainable is left after {name!r}: the head itself cannot be dropped", where="upto", fix=fix)
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


def crops_of(graph: Graph, cuts: Mapping[str, Node], *, named: bool) -> tuple[dict[str, Croppable], dict[str, str]]:
    """What is cached of the cuts whose activations can be cropped in the place of the images, and why the others cannot.

    Raises PassError if there is none, or if one cannot that was `named`.
    """
    found, left_out = dict[str, Croppable](), dict[str, str]()
    for name, cut in cuts.items():
        try:
            found[name] = croppable(graph, cut)
        except PassError as error:
            if named:
                raise PassError(f"{error.what} ({error.where})", where="crops", fix=_FIX_CROPS) from error
            left_out[name] = f"{error.what} ({error.where})"
    if not found:
        raise PassError(next(iter(left_out.values())), where="crops", fix=_FIX_CROPS)
    return found, left_out


_FIX_CROPS = "End the prefix earlier, or compute a part of the features anew in each epoch (refresh = 4)"


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


def drop_prefix(edit: Editor, cuts: Sequence[Node]) -> dict[str, int]:
    """Takes everything up to the last of `cuts` out of training.

    The graph can afterwards be divided at each of the cuts, so that the features of a later one can be computed from those of an earlier.
    Returns figures for the report.

    Raises:
        PassError: a parameter is read before and after the cut, the prefix draws random numbers in eval mode too, or a section of another
            pass with a loss of its own lies in it.
    """
    graph, last = edit.graph, cuts[-1]
    nodes = prefix_of(graph, last)
    _check_separable(graph, nodes)
    names = parameters_of(graph, nodes)
    edit.freeze(names)
    converted = _stay_in_eval_mode(edit, nodes)
    edit.keep_buffers((*nodes, *_read_for_nothing(graph, nodes)))
    for cut in cuts:
        _recompute_scalars(edit, cut)
    active = activations(graph)
    edit.outline(prefix_of(graph, last), NoGrad, "dropped_prefix", only=lambda piece: not active.isdisjoint(piece))
    parameters = sum(graph.module.get_parameter(n).numel() for n in names)
    return {"prefix_nodes": len(nodes), "prefix_parameters": parameters, "always_eval": converted}


def _check_separable(graph: Graph, prefix: Sequence[Node]) -> None:
    inside = set(prefix)
    later = {id(p): name for n in graph.nodes if n not in inside for name, p in parameters_read(graph.module, n)}
    for name in parameters_of(graph, prefix):
        if (other := later.get(id(graph.module.get_parameter(name)))) is not None:
            what = f"{name} is read before the cut and after it (as {other}), so it cannot be dropped"
            raise PassError(what, where=name, fix="End the prefix where no parameter is shared across its end")
    for node in prefix:
        if node.op == "call_function" and is_random(node.target):
            raise PassError("the prefix draws random numbers, so its features cannot be cached", where=f"node {node}")
    for section in graph.sections:
        if section.target and not inside.isdisjoint(section.nodes):
            what = f"{section.author.name} trains a part of the prefix with a local loss, so it cannot be dropped"
            raise PassError(what, where=str(section.author), fix="End the prefix earlier, or leave one of the two passes out")


def _read_for_nothing(graph: Graph, prefix: Sequence[Node]) -> list[Node]:
    """What modules that lie wholly in a prefix read, and the output does not depend on: buffers that they only write."""
    inside, used = set(prefix), ancestors([graph.output])

    def is_inside(path: str) -> bool:
        nodes = [n for n in used if "origin" in n.meta and is_below(n.meta["origin"].path, (path,))]
        return bool(nodes) and inside.issuperset(nodes)

    return [n for n in graph.nodes if n.op == "get_attr" and n not in used and is_inside(n.meta["origin"].path)]


def _stay_in_eval_mode(edit: Editor, prefix: Sequence[Node]) -> int:
    """Replaces leaves that depend on the mode; those that are also called after the cut get a copy. Returns how many leaves."""
    inside, count = set(prefix), 0
    for target in dict.fromkeys(str(n.target) for n in prefix if n.op == "call_module"):
        module = edit.graph.module.get_submodule(target)
        if not depends_on_mode(module):
            continue
        calls = [n for n in edit.calls(target) if n in inside]
        if len(calls) == len(edit.calls(target)):
            edit.replace_leaf(calls[0], always_eval(module))
        else:
            # It has no parameters, or one would be read before and after the cut: without buffers too, no state-dict key changes.
            if next(module.buffers(), None) is not None:
                why = f"{target} is called before the cut and after it, and has buffers"
                raise PassError(why, where=target, fix="End the prefix elsewhere")
            path = f"always_eval.{target.replace('.', '_')}"
            edit.add_module(path, always_eval(module))
            for call in calls:
                edit.set_call(call, path)
        count += 1
    return count


def _recompute_scalars(edit: Editor, cut: Node) -> None:
    """Recomputes numbers of shape arithmetic that cross a cut from the cut itself: constants, or multiples of the batch size."""
    graph = edit.graph
    after = descendants([cut]) - {cut}
    from_input = descendants([graph.placeholder])
    read = dict.fromkeys(i for n in graph.nodes if n in after for i in n.all_input_nodes)
    crossing = [n for n in read if n is not cut and n not in after and n in from_input]
    if not crossing:
        return
    batch = edit.call("size", (cut, 0), after=cut)
    copied = fx.GraphModule(graph.module, copy.deepcopy(graph.fx))
    propagate_shapes(copied, graph.input, SHAPE_BATCH + 1)
    larger = {node: other.meta.get("val") for node, other in zip(graph.nodes, copied.graph.nodes, strict=True)}
    for node in crossing:
        small = node.meta["val"]
        if isinstance(small, torch.Tensor):
            raise PassError(f"{node} leads from the prefix past its end", where=f"node {node}")
        edit.redirect(node, _scaled(edit, node, small, larger[node], batch), [u for u in node.users if u in after])


def _scaled(edit: Editor, node: Node, small: Any, large: Any, batch: Node) -> Any:
    """A number, or a nest of numbers, that is `small` at one batch size and `large` at the next, in terms of the batch size."""
    if isinstance(small, tuple | list):
        values = [_scaled(edit, node, a, b, batch) for a, b in zip(small, large, strict=True)]
        return values if isinstance(small, list) else tuple(values)
    if small == large or not isinstance(small, int):
        return small
    factor = small // SHAPE_BATCH
    if (factor * SHAPE_BATCH, factor * (SHAPE_BATCH + 1)) != (small, large):
        raise PassError("a number that depends on the batch crosses the cut, and is not a multiple of the batch size", where=f"node {node}")
    return batch if factor == 1 else edit.call(operator.mul, (batch, factor), after=batch)
