"""The flat training graph that passes rewrite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import fx
from torch.fx import Node

from graphopt.ir.collector import uncollected
from graphopt.ir.copying import alias_copy, copy_node, copy_with
from graphopt.ir.inputs import Input
from graphopt.ir.module import TrainingModule
from graphopt.ir.paths import lineage
from graphopt.ir.section import Section
from graphopt.ir.shapes import propagate_shapes, update_shapes

Result = TypeVar("Result")


class Origin(NamedTuple):
    """Where in the backbone a node comes from: module path (`""` is the backbone itself) and which call of that module."""

    path: str
    call: int


class Opaque(NamedTuple):
    """A module kept as one leaf, with the reason."""

    path: str
    reason: str


class Graph:
    """One backbone as a flat graph: a placeholder `x` of shape (N, *input), leaf modules at the backbone's own paths, one output.

    Further inputs are placeholders with the names that the backbone's forward gives them.

    Every node carries `meta["origin"]` (`Origin`), `meta["val"]` (a fake tensor, or the Python value, at batch 2) and, where a pass put
    or changed it, `meta["pass"]` (number of the pass instance, from 0). Change a graph through `graphopt.ir.editor.Editor` only.

    Attributes:
        module: the `fx.GraphModule`; its state-dict keys are the backbone's until a pass says otherwise.
        input: shape of one sample, of each input where there are several (`graphopt.ir.inputs`); the batch stays free.
        types: class name of every module of the backbone, by path.
        groups: the author's own blocks as lists of parameter names, where the model publishes them (timm's `group_matcher`).
        opaque: modules kept whole, with reasons.
        unused: parameters that no node uses, or that a step gives no gradient; they are kept, and reported.
        aliases: further paths of modules that are registered more than once, and the path of each in the graph.
        sections: nodes that run as one unit in the emitted module; passes append, emission outlines.
        untouched: the graph as it was traced; itself, for a graph that is no clone.
    """

    def __init__(
        self,
        module: TrainingModule,
        input: Input,
        types: dict[str, str],
        groups: tuple[tuple[str, ...], ...] = (),
        opaque: tuple[Opaque, ...] = (),
        unused: tuple[str, ...] = (),
        aliases: Mapping[str, str] | None = None,
        untouched: Graph | None = None,
    ) -> None:
        self.module, self.input, self.types, self.groups = module, input, types, groups
        self.opaque, self.unused, self.aliases = opaque, unused, aliases or {}
        self.sections: list[Section] = []
        self.untouched = untouched or self
        self._results: dict[Callable[..., Any], Any] = {}
        #: nodes that compute something else than when their values were worked out
        self._stale: set[Node] = set()

    @property
    def fx(self) -> fx.Graph:
        """The `torch.fx` graph itself, for reading."""
        return self.module.graph

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes in execution order."""
        return self.cached(_nodes)

    @property
    def order(self) -> dict[Node, int]:
        """Position of each node in execution order."""
        return self.cached(_order)

    @property
    def placeholder(self) -> Node:
        """The first input, `x`."""
        return next(iter(self.fx.find_nodes(op="placeholder")))

    @property
    def output(self) -> Node:
        """The output node."""
        return self.fx.output_node()

    @property
    def paths(self) -> tuple[str, ...]:
        """What a selector can name, in execution order, outer before inner: module paths, and parameters that the graph reads itself."""
        return self.cached(_paths)

    def cached(self, analysis: Callable[[Graph], Result]) -> Result:
        """`analysis(self)`, kept until the graph changes. Do not change the result."""
        if analysis not in self._results:
            self._results[analysis] = analysis(self)
        return self._results[analysis]

    def changed(self, nodes: Iterable[Node] = ()) -> None:
        """Forgets the results of all analyses. The editor calls it after every edit, with the nodes that compute something else now."""
        self._results.clear()
        self._stale.update(nodes)

    @uncollected()
    def clone(self, *, weights: bool = True) -> Graph:
        """A deep copy, sections included; without `weights`, its tensors share the memory of this graph's."""
        copies: dict[Node, Node] = {}
        nodes = fx.Graph()
        for node in self.nodes:
            copies[node] = copy_node(nodes, node, copies)
        copied = copy_with(self.module) if weights else alias_copy(self.module)
        # Without weights of its own it is not trained, and hardly ever run.
        module = TrainingModule(copied, nodes, type(self.module).__name__, late=not weights)
        other = Graph(module, self.input, self.types, self.groups, self.opaque, self.unused, self.aliases, self.untouched)
        other.sections = [replace(s, nodes=tuple(copies[n] for n in s.nodes)) for s in self.sections]
        return other

    def refresh(self) -> None:
        """After edits: lint, recompile, shapes, and an origin for every new node (that of its last input, if none was given)."""
        graph = self.module.graph
        graph.lint()
        self.module.recompile()
        for node in graph.nodes:
            if "origin" not in node.meta:
                given = [n.meta["origin"] for n in node.all_input_nodes if "origin" in n.meta]
                node.meta["origin"] = given[-1] if given else Origin("", 0)
        if not update_shapes(self.module, self._stale):
            propagate_shapes(self.module, self.input)
        self._stale.clear()
        self.changed()


def _nodes(graph: Graph) -> tuple[Node, ...]:
    return tuple(graph.module.graph.nodes)


def _order(graph: Graph) -> dict[Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}


def _paths(graph: Graph) -> tuple[str, ...]:
    seen: dict[str, None] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        seen |= dict.fromkeys(lineage(node.meta["origin"].path))
        if node.op == "get_attr":
            seen.setdefault(str(node.target))
    seen.pop("", None)
    return tuple(seen)
