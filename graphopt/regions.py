"""Regions of a graph, its cut points, and its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from graphopt.trace.graph import Graph


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
    nodes: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]
    closed: bool
    parameters: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Region({self.name!r}, {self.kind}, {len(self.nodes)} nodes)"

    def covers(self, other: Region) -> bool:
        """Whether every node of `other` is one of this region's."""
        return set(other.nodes) <= set(self.nodes)


def activations(graph: Graph) -> set[fx.Node]:
    """Nodes that carry activations: tensors computed from the input. Shape arithmetic and what only parameters feed do not count."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op != "output" and any(n in found for n in node.all_input_nodes)
        if node.op == "placeholder" or (computed and _holds_tensor(node.meta.get("val"))):
            found.add(node)
    return found


def _edges(nodes: Iterable[fx.Node], active: set[fx.Node]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Activations that come in from outside, and those that go out. A look at a shape from outside is no way out."""
    nodes = tuple(nodes)
    members = set(nodes)
    entries = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in members and i in active)
    exits = tuple(n for n in nodes if n in active and any(u not in members and (u in active or u.op == "output") for u in n.users))
    return tuple(entries), exits


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (tuple, list)) and any(map(_holds_tensor, value))


def parameters_of(graph: Graph, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Names of the parameters that nodes read, in order of use, each once (a tied one under the name it is first read by)."""
    names: dict[str, None] = {}
    held: set[int] = set()
    for node in nodes:
        for name, parameter in _parameters_read(graph.module, node):
            if id(parameter) not in held:
                held.add(id(parameter))
                names.setdefault(name)
    return tuple(names)


def _parameters_read(module: nn.Module, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    if node.op == "call_module":
        for name, parameter in module.get_submodule(str(node.target)).named_parameters():
            yield f"{node.target}.{name}", parameter
    elif node.op == "get_attr":
        value = attribute(module, str(node.target))
        if isinstance(value, nn.Parameter):
            yield str(node.target), value


def attribute(module: nn.Module, target: str) -> Any:
    """What a `get_attr` node reads."""
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


class Index:
    """Regions of one graph as it stands, looked up in time proportional to what they hold. Stale after any edit: make a new one."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.active = activations(graph)
        self.order: dict[fx.Node, int] = {}
        self._below: dict[str, dict[fx.Node, None]] = {}
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            if node.op in ("placeholder", "output"):
                continue
            # What a pass reads from elsewhere (a neighbour's weight in a mix) lies where it is read, or order would lose its meaning.
            native = node.op == "get_attr" and "by" not in node.meta
            places = {*_ancestry(node.meta["origin"].path), *(_ancestry(str(node.target)) if native else ())}
            for path in places:
                self._below.setdefault(path, {})[node] = None

    def region(self, paths: tuple[str, ...]) -> Region:
        """The region of a run of paths, whatever it holds (empty where nothing comes from there)."""
        if len(paths) == 1:
            return _region(self.graph, paths, tuple(self._below.get(paths[0], ())), self.active)
        nodes = {n for p in paths for n in self._below.get(p, ())}
        return _region(self.graph, paths, tuple(sorted(nodes, key=self.order.__getitem__)), self.active)


def _ancestry(path: str) -> Iterator[str]:
    """`""`, `a`, `a.b`, `a.b.c` for `a.b.c`."""
    yield ""
    if path:
        parts = path.split(".")
        yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def region_of(graph: Graph, paths: tuple[str, ...]) -> Region:
    """One region; for several of one graph, ask an `Index`."""
    return Index(graph).region(paths)


def _region(graph: Graph, paths: tuple[str, ...], nodes: tuple[fx.Node, ...], active: set[fx.Node]) -> Region:
    entries, exits = _edges(nodes, active)
    if len(paths) == 1:
        kind = graph.types.get(paths[0], "Parameter")
    else:
        first = next((graph.types[p] for p in paths if any(True for _ in _own_parameters(graph, p))), graph.types.get(paths[0], ""))
        kind = f"{first} unit"
    return Region(
        name=_run_name(paths),
        paths=paths,
        kind=kind,
        nodes=nodes,
        entries=entries,
        exits=exits,
        closed=len(entries) == 1 and len(exits) == 1,
        # What a pass reads here from elsewhere (a neighbour's weight in a mix) stays its owner's.
        parameters=parameters_of(graph, (n for n in nodes if "by" not in n.meta or n.op != "get_attr" or _below(str(n.target), paths))),
    )


def _below(name: str, paths: tuple[str, ...]) -> bool:
    return "" in paths or name in paths or name.startswith(tuple(f"{p}." for p in paths))


def _own_parameters(graph: Graph, path: str) -> Iterator[nn.Parameter]:
    try:
        yield from graph.module.get_submodule(path).parameters()
    except AttributeError:
        return


def _run_name(paths: tuple[str, ...]) -> str:
    """`features.0-2` for a run under one parent, `conv1-maxpool` at the root."""
    if len(paths) == 1:
        return paths[0]
    return f"{paths[0]}-{paths[-1].rpartition('.')[2]}"


def cut_points(graph: Graph) -> tuple[fx.Node, ...]:
    """Activations that every path from input to output crosses (dominators of the output), in execution order.

    Only edges between activations count: scalars of shape arithmetic, and tensors made of parameters alone, can be computed again on
    either side of a cut.
    """
    active = activations(graph)
    flow = nx.DiGraph()
    flow.add_node(graph.placeholder)
    for node in graph.nodes:
        if node in active or node.op == "output":
            flow.add_edges_from((i, node) for i in node.all_input_nodes if i in active)
    output = graph.output
    if output not in flow:
        return ()
    dominators = nx.immediate_dominators(flow, graph.placeholder)
    chain: list[fx.Node] = []
    node = dominators.get(output)
    while node is not None and node is not graph.placeholder:
        if isinstance(node.meta.get("val"), torch.Tensor):
            chain.append(node)
        node = dominators.get(node)
    return tuple(reversed(chain))


def parts(graph: Graph) -> tuple[Region, ...]:
    """A backbone in disjoint parts, in execution order: its blocks, and the outermost paths beside them that hold none."""
    index = Index(graph)
    blocks = graph.blocks()
    taken = {path for block in blocks for path in block.paths}
    above = {p for path in taken for p in _ancestry(path)} - taken
    beside = [p for p in graph.paths() if p not in above and p not in taken and p.rpartition(".")[0] in above | {""}]
    found = [*blocks, *(index.region((p,)) for p in beside)]
    return tuple(sorted((r for r in found if r.nodes), key=lambda r: index.order[r.nodes[0]]))


# -- blocks ---------------------------------------------------------------------------------------------------------------------


#: modules that only hold others: never blocks themselves
_CONTAINERS = frozenset({"Sequential", "ModuleList", "ModuleDict"})


class _Tree:
    """Module paths that take part in a graph, with what their flow looks like."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.active = activations(graph)
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            parts = node.meta["origin"].path.split(".") if node.meta["origin"].path else []
            for depth in range(len(parts) + 1):
                self.nodes.setdefault(".".join(parts[:depth]), []).append(node)

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
        entries, exits = _edges(self.nodes[path], self.active)
        return len(entries) == 1 and len(exits) == 1

    def is_leaf(self, path: str) -> bool:
        return not self.children(path)

    def is_chain(self, path: str) -> bool:
        """Whether activations flow through the parts of a module one after the other: no branch, no shortcut."""
        owner: dict[fx.Node, str] = {}
        children = self.children(path)
        for child in children:
            for node in self.nodes[child]:
                owner[node] = child
        parts: dict[Any, list[fx.Node]] = {}
        for node in self.nodes[path]:
            if node in self.active:
                parts.setdefault(owner.get(node, node), []).append(node)
        previous: tuple[fx.Node, ...] | None = None
        for nodes in parts.values():
            entries, exits = _edges(nodes, self.active)
            if len(entries) != 1 or len(exits) != 1 or (previous is not None and entries != previous):
                return False
            previous = exits
        return True


def find_blocks(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Paths of each block: the author's where timm publishes them, else the repeated closed parts that are no mere chain, else units.

    A unit is a run of leaves that starts at a convolution or linear layer and goes on to the next (conv, norm, activation, pool).
    """
    tree = _Tree(graph)
    authored = _authored_blocks(tree)
    if authored:
        return authored
    found: list[str] = []
    kinds = Counter(graph.types.get(p, "") for p in tree.nodes if p and not tree.is_leaf(p))

    def walk(path: str) -> None:
        for child in tree.children(path):
            if tree.is_leaf(child):
                continue
            kind = graph.types.get(child, "")
            repeated = kinds[kind] > 1 and kind not in _CONTAINERS
            if repeated and tree.closed(child) and not tree.is_chain(child):
                found.append(child)
            else:
                walk(child)

    walk("")
    return _with_sisters(tree, found) or _units(tree)


def _with_sisters(tree: _Tree, found: list[str]) -> tuple[tuple[str, ...], ...]:
    """Blocks of the same kinds as those found: one without a shortcut (a stage's first) is a mere chain, and still a block."""
    kinds = {tree.graph.types[p] for p in found}
    sisters = [p for p in tree.nodes if tree.graph.types.get(p) in kinds and tree.closed(p)]
    outer = [p for p in sisters if not any(p != q and p.startswith(f"{q}.") for q in sisters)]
    return tuple((p,) for p in _in_order(tree, outer))


def _authored_blocks(tree: _Tree) -> tuple[tuple[str, ...], ...]:
    """The author's groups that are whole modules, closed and repeated. Stems, heads and groups that gather strays are none."""
    graph = tree.graph
    owned = Counter[str]()
    for name, _ in graph.module.named_parameters():
        parts = name.split(".")
        owned.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    paths: list[str] = []
    for names in graph.groups:
        owners = [name.split(".")[:-1] for name in names]
        path = ".".join(level[0] for level in _while_equal(owners))
        if path not in tree.nodes or tree.is_leaf(path) or graph.types[path] in _CONTAINERS:
            continue
        if owned[path] == len(names) and tree.closed(path):
            paths.append(path)
    kinds = Counter(graph.types[p] for p in paths)
    paths = [p for p in paths if kinds[graph.types[p]] > 1]
    # Groups can be coarser than blocks (whole stages): then the structure knows better.
    if all(tree.is_chain(p) for p in paths):
        return ()
    return _with_sisters(tree, paths)


def _while_equal(parts: list[list[str]]) -> Iterator[tuple[str, ...]]:
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            return
        yield level


def _in_order(tree: _Tree, paths: Iterable[str]) -> list[str]:
    position = {node: i for i, node in enumerate(tree.graph.nodes)}
    return sorted(paths, key=lambda p: position[tree.nodes[p][0]])


def _units(tree: _Tree) -> tuple[tuple[str, ...], ...]:
    """Conv-norm-act units of a plain chain (VGG, AlexNet): convolutional ones, or linear ones where there are none."""
    weighted = {"Conv1d", "Conv2d", "Conv3d", "Linear"}
    runs: list[list[str]] = []
    last_parent = None
    for node in tree.graph.nodes:
        if node.op != "call_module":
            continue
        path = node.meta["origin"].path
        parent = path.rpartition(".")[0]
        module = tree.graph.module.get_submodule(str(node.target))
        is_weighted = type(module).__name__ in weighted or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        if is_weighted:
            runs.append([path])
        elif runs and parent == last_parent:
            runs[-1].append(path)
        last_parent = parent
    kinds = Counter(tree.graph.types[r[0]] for r in runs)
    convolutional = [r for r in runs if "Conv" in tree.graph.types[r[0]]]
    chosen = convolutional if len(convolutional) > 1 else runs
    return tuple(tuple(dict.fromkeys(r)) for r in chosen if kinds[tree.graph.types[r[0]]] > 1)
