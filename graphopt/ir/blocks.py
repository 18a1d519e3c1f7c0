"""The natural blocks of a backbone, and its division into disjoint parts."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations
from graphopt.ir.paths import common_path, containers, lineage, owner
from graphopt.ir.regions import Region, entries_and_exits, region_of


def find_blocks(graph: Graph) -> tuple[Region, ...]:
    """The natural repeated blocks of the model (found on the untouched graph), in execution order, with the nodes they have in this one."""
    return graph.cached(_blocks)


def _blocks(graph: Graph) -> tuple[Region, ...]:
    return tuple(r for paths in graph.untouched.cached(block_paths) if (r := region_of(graph, paths)).nodes)


def disjoint_parts(graph: Graph) -> tuple[Region, ...]:
    """A backbone in disjoint parts, in execution order: its blocks, and the outermost other paths that contain no block."""
    blocks = find_blocks(graph)
    taken = {path for block in blocks for path in block.paths}
    above = {p for path in taken for p in lineage(path)} - taken
    others = [p for p in graph.paths if p not in above and p not in taken and owner(p) in above | {""}]
    found = [*blocks, *(region_of(graph, (p,)) for p in others)]
    return tuple(sorted((r for r in found if r.nodes), key=lambda r: graph.order[r.nodes[0]]))


#: modules that only hold others: never blocks themselves
_CONTAINERS = frozenset({"Sequential", "ModuleList", "ModuleDict"})


class _Tree:
    """The module paths of a graph, and how activations flow through them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.active = activations(graph)
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            for path in lineage(node.meta["origin"].path):
                self.nodes.setdefault(path, []).append(node)

    def children(self, path: str) -> list[str]:
        """Direct children in execution order."""
        prefix = f"{path}." if path else ""
        found: dict[str, None] = {}
        for node in self.nodes.get(path, ()):
            below = node.meta["origin"].path
            if below != path and below.startswith(prefix):
                found.setdefault(prefix + below[len(prefix) :].split(".")[0])
        return list(found)

    def closed(self, path: str) -> bool:
        entries, exits = entries_and_exits(self.nodes[path], self.active)
        return len(entries) == 1 and len(exits) == 1

    def is_leaf(self, path: str) -> bool:
        return not self.children(path)

    def is_chain(self, path: str) -> bool:
        """Whether activations flow through the parts of a module one after the other: no branch, no shortcut."""
        owner = {node: child for child in self.children(path) for node in self.nodes[child]}
        parts: dict[Any, list[fx.Node]] = {}
        for node in self.nodes[path]:
            if node in self.active:
                parts.setdefault(owner.get(node, node), []).append(node)
        previous: tuple[fx.Node, ...] | None = None
        for nodes in parts.values():
            entries, exits = entries_and_exits(nodes, self.active)
            if len(entries) != 1 or len(exits) != 1 or (previous is not None and entries != previous):
                return False
            previous = exits
        return True


def block_paths(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Paths of each block: timm's own groups if the model has them; else repeated closed modules with a branch or shortcut; else units.

    A unit is a run of leaves that starts at a convolution or linear layer and goes on to the next (conv, norm, activation, pool).
    """
    tree = _Tree(graph)
    if authored := _authored_blocks(tree):
        return authored
    found: list[str] = []
    kinds = Counter(graph.types.get(p, "") for p in tree.nodes if p and not tree.is_leaf(p))

    def walk(path: str) -> None:
        for child in tree.children(path):
            if tree.is_leaf(child):
                continue
            kind = graph.types.get(child, "")
            if kinds[kind] > 1 and kind not in _CONTAINERS and tree.closed(child) and not tree.is_chain(child):
                found.append(child)
            else:
                walk(child)

    walk("")
    return _with_sisters(tree, found) or _compound_leaves(tree) or _units(tree)


def _compound_leaves(tree: _Tree) -> tuple[tuple[str, ...], ...]:
    """Repeated leaves that have parts of their own (`nn.TransformerEncoderLayer`, blocks that could not be traced)."""
    paths = [p for p in tree.nodes if p and tree.is_leaf(p) and next(tree.graph.module.get_submodule(p).children(), None) is not None]
    kinds = Counter(tree.graph.types[p] for p in paths)
    return tuple((p,) for p in _in_order(tree, (p for p in paths if kinds[tree.graph.types[p]] > 1 and tree.closed(p))))


def _with_sisters(tree: _Tree, found: list[str]) -> tuple[tuple[str, ...], ...]:
    """The blocks found, and other modules of their classes: the first of a stage may have no shortcut, and still is a block."""
    kinds = {tree.graph.types[p] for p in found}
    sisters = [p for p in tree.nodes if tree.graph.types.get(p) in kinds and tree.closed(p)]
    known = set(sisters)
    outer = [p for p in sisters if known.isdisjoint(containers(p))]
    return tuple((p,) for p in _in_order(tree, outer))


def _authored_blocks(tree: _Tree) -> tuple[tuple[str, ...], ...]:
    """The groups of timm that are whole modules, closed and repeated. Stems, heads and catch-all groups are not blocks."""
    graph = tree.graph
    owned = Counter[str]()
    for name, _ in graph.module.named_parameters():
        owned.update(containers(name))
    paths: list[str] = []
    for names in graph.groups:
        path = common_path(owner(name) for name in names)
        if path not in tree.nodes or tree.is_leaf(path) or graph.types[path] in _CONTAINERS:
            continue
        if owned[path] == len(names) and tree.closed(path):
            paths.append(path)
    kinds = Counter(graph.types[p] for p in paths)
    paths = [p for p in paths if kinds[graph.types[p]] > 1]
    # Groups can be coarser than blocks (whole stages): then blocks are found by structure.
    if all(tree.is_chain(p) for p in paths):
        return ()
    return _with_sisters(tree, paths)


def _in_order(tree: _Tree, paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda p: tree.graph.order[tree.nodes[p][0]])


def _units(tree: _Tree) -> tuple[tuple[str, ...], ...]:
    """Conv-norm-act units of a plain chain (VGG, AlexNet): convolutional ones, or linear ones where there are none."""
    runs: list[list[str]] = []
    last_parent = None
    for node in tree.graph.nodes:
        if node.op != "call_module":
            continue
        path = node.meta["origin"].path
        if isinstance(tree.graph.module.get_submodule(str(node.target)), nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            runs.append([path])
        elif runs and owner(path) == last_parent:
            runs[-1].append(path)
        last_parent = owner(path)
    kinds = Counter(tree.graph.types[r[0]] for r in runs)
    convolutional = [r for r in runs if "Conv" in tree.graph.types[r[0]]]
    chosen = convolutional if len(convolutional) > 1 else runs
    return tuple(tuple(dict.fromkeys(r)) for r in chosen if kinds[tree.graph.types[r[0]]] > 1)
