"""The parts of a flat network between its cut points: one tensor enters each, and one leaves it.

Phases of a run differ in few parts. What a step does in a part follows from the part alone, and from the layout of what enters it, so that
`graphopt.cost.composed` runs equal parts once.
"""

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.ir.copying import LooseTensor, outline
from graphopt.ir.paths import owner
from graphopt.runtime.body import NoGrad, bodies

#: operations that take values and give one
_CALLS = ("call_function", "call_method", "call_module")


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive nodes of a network.

    Attributes:
        nodes: in execution order; those that read a tensor of the network are left out. unrecorded: those that run without gradients.
        entry, exit: the nodes whose values enter and leave; the last part has the output node as its exit.
        sources: the node that gives the value of another one, of each that only stands for it.
        leaves: the modules that are called, by target. read: the tensors that nodes read by name, by target.
        tensors: parameters and buffers that the part reads, each once.
        last_uses: the values that nothing uses behind each node, in the order in which they are released.
        key: equal for parts that compute the same, wherever they lie in this network or in another.
    """

    nodes: tuple[Node, ...]
    unrecorded: set[Node]
    entry: Node
    exit: Node
    first: bool
    last: bool
    sources: dict[Node, Node]
    leaves: dict[str, nn.Module]
    read: dict[str, Tensor]
    tensors: tuple[Tensor, ...]
    last_uses: dict[Node, list[Node]]
    key: Any = field(repr=False)

    def source(self, node: Node) -> Node:
        """The node whose value this one has."""
        return _source(self.sources, node)

    def path(self, place: str) -> str:
        """What a place in a recording of the part, the number of a node and what is inside of it, is called in the network."""
        number, dot, inside = place.partition(".")
        return f"{self.nodes[int(number)].meta['origin'].path}{dot}{inside}" if number else ""


def parts_of(module: nn.Module) -> tuple[Part, ...] | None:
    """The parts of an emitted module, in execution order; None for one that is not taken apart.

    It must be a graph of one input whose only sections, if any, run without gradients on that input.
    """
    if not isinstance(module, fx.GraphModule):
        return None
    flat = _Flat(module)
    if not flat.complete or any("origin" not in node.meta for node in flat.nodes):
        return None
    bounds = [0, *flat.cuts(), len(flat.nodes)]
    if len(bounds) == 2:
        return None
    try:
        return tuple(flat.parts(bounds))
    except LooseTensor:
        return None


def _source(sources: Mapping[Node, Node], node: Node) -> Node:
    while node in sources:
        node = sources[node]
    return node


class _Flat:
    """The calls of a module in execution order, those inside sections without gradients in the place of the sections.

    Attributes:
        complete: whether that is all that the module runs.
        nodes: the calls. unrecorded: those that run without gradients.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.modules = module, dict(module.named_modules())
        self.nodes: list[Node] = []
        self.sources: dict[Node, Node] = {}
        self.unrecorded: set[Node] = set()
        sections = sum(1 for _ in bodies(module))
        inputs = module.graph.find_nodes(op="placeholder")
        self.complete = len(inputs) == 1
        self.input, self.output = next(iter(inputs)), module.graph.output_node()
        for node in module.graph.nodes:
            wrapper = self.modules.get(str(node.target)) if node.op == "call_module" else None
            # What is attributed to a module goes by the name under which it is registered first.
            self.complete &= wrapper is not None or node.op != "call_module"
            if isinstance(wrapper, NoGrad) and not node.kwargs and all(i.op in ("placeholder", "get_attr") for i in node.all_input_nodes):
                self._expand(node, wrapper)
                sections -= 1
            elif node.op in _CALLS and node not in self.sources:
                self.nodes.append(node)
        self.complete &= sections == 0
        #: what each call takes, and the number of the last call that uses a value
        self.inputs = {node: [self.source(i) for i in node.all_input_nodes] for node in (*self.nodes, self.output)}
        self.last_use = {value: number for number, node in enumerate((*self.nodes, self.output)) for value in self.inputs[node]}
        self._registered: dict[str, tuple[Tensor, ...]] = {}

    def _expand(self, call: Node, wrapper: NoGrad) -> None:
        graph: fx.Graph = wrapper.body.module.graph  # type: ignore[assignment]  # a body is a graph module
        for given, node in zip(call.args, graph.find_nodes(op="placeholder"), strict=True):
            assert isinstance(given, Node)
            self.sources[node] = given
        inner = [node for node in graph.nodes if node.op in _CALLS]
        self.nodes += inner
        self.unrecorded.update(inner)
        self.complete &= all(str(node.target) in self.modules for node in inner if node.op == "call_module")
        result: Any = graph.output_node().args[0]
        if isinstance(result, Node):
            self.sources[call] = result
            return
        for user in call.users:  # several values leave it, and are taken out one by one
            given = result[user.args[1]] if user.target is operator.getitem else None
            if isinstance(given, Node):
                self.sources[user] = given
            else:
                self.complete = False

    def source(self, node: Node) -> Node:
        """The node whose value this one has."""
        return _source(self.sources, node)

    def cuts(self) -> list[int]:
        """The numbers of calls before which a single tensor is all that is used from there on, and nothing else of what was used before."""
        open_until: dict[int, int] = {}  # of each tensor of the module, by identity, the last call that reads it
        first_use: dict[int, int] = {}
        for number, node in enumerate(self.nodes):
            for tensor in self.tensors_of(node):
                first_use.setdefault(id(tensor), number)
                open_until[id(tensor)] = number
        held = [0] * (len(self.nodes) + 1)  # tensors of the module that calls on both sides of a place read
        for key, first in first_use.items():
            if open_until[key] > first:
                held[first + 1] += 1
                held[open_until[key] + 1] -= 1
        found, waiting, reading = [], {self.input: self.last_use.get(self.input, -1)}, 0
        for number, node in enumerate(self.nodes):
            reading += held[number]
            waiting = {value: end for value, end in waiting.items() if end >= number}
            if number and not reading and len(waiting) == 1 and self._is_cut(next(iter(waiting))):
                found.append(number)
            if (end := self.last_use.get(node, -1)) > number:
                waiting[node] = end
        return found

    def _is_cut(self, node: Node) -> bool:
        """Whether a value is a tensor of its own, and no view of another."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node is self.input:
            return False
        memory = value.untyped_storage()._cdata
        given = [i.meta.get("val") for i in self.inputs[node]]
        return all(g.shape == value.shape for g in given if isinstance(g, Tensor) and g.untyped_storage()._cdata == memory)

    def tensors_of(self, node: Node) -> Iterator[Tensor]:
        """Parameters and buffers that a call reads."""
        if node.op == "call_module":
            yield from self._of_leaf(str(node.target))
        for given in self.inputs[node]:
            if given.op == "get_attr":
                yield _tensor(self.module, str(given.target))

    def _of_leaf(self, target: str) -> tuple[Tensor, ...]:
        if target not in self._registered:
            leaf = self.modules[target]
            if leaf._modules:
                self._registered[target] = (*leaf.parameters(), *leaf.buffers())
            else:  # most of them: what they hold is at hand
                self._registered[target] = tuple(t for held in (leaf._parameters, leaf._buffers) for t in held.values() if t is not None)
        return self._registered[target]

    def parts(self, bounds: Sequence[int]) -> Iterator[Part]:
        entry = self.input
        for start, end in itertools.pairwise(bounds):
            nodes, last = tuple(self.nodes[start:end]), end == len(self.nodes)
            # The one value that later parts use.
            leaving = self.output if last else next(n for n in (*reversed(nodes), entry) if self.last_use.get(n, -1) >= end)
            leaves = {str(n.target): self.modules[str(n.target)] for n in nodes if n.op == "call_module"}
            users = (*nodes, self.output) if last else nodes
            targets = dict.fromkeys(str(i.target) for n in users for i in self.inputs[n] if i.op == "get_attr")
            read = {target: _tensor(self.module, target) for target in targets}
            used = [t for n in nodes for t in self.tensors_of(n)] + [*read.values()]
            tensors = {id(t): t for t in used}
            numbers = {which: number for number, which in enumerate(tensors)}
            key = (start == 0, last, tuple(numbers[id(t)] for t in used), *self._described(entry, nodes, leaving, leaves, read))
            found: dict[str, Any] = {"leaves": leaves, "read": read, "tensors": tuple(tensors.values()), "key": key}
            found |= {"unrecorded": self.unrecorded.intersection(nodes), "last_uses": self._last_uses(start, end)}
            yield Part(nodes=nodes, entry=entry, exit=leaving, first=start == 0, last=last, sources=self.sources, **found)
            entry = leaving

    def _described(
        self, entry: Node, nodes: Sequence[Node], leaving: Node, leaves: dict[str, nn.Module], read: dict[str, Tensor]
    ) -> Iterator[Any]:
        """Nodes and what they call, by numbers in the place of names."""
        numbers: dict[Any, bytes] = {value: b"%d" % number for number, value in enumerate((self.source(entry), *nodes, *leaves, *read))}

        def number(node: Node) -> Any:
            node = self.source(node)
            return numbers[str(node.target) if node.op == "get_attr" else node]

        for node in nodes:
            called = numbers[str(node.target)] if node.op == "call_module" else node.target
            yield node.op, called, node in self.unrecorded, repr(map_arg((node.args, node.kwargs), number))
        yield repr(map_arg(leaving.args, number)) if leaving is self.output else number(leaving)
        yield from map(outline, (*leaves.values(), *read.values()))

    def _last_uses(self, start: int, end: int) -> dict[Node, list[Node]]:
        """The values that nothing uses behind each of the calls from `start` to `end`; those of no use at all, too."""
        found: dict[Node, list[Node]] = {}
        for number in range(start, end):
            node = self.nodes[number]
            gone = dict.fromkeys(i for i in self.inputs[node] if i.op != "get_attr" and self.last_use[i] == number)
            found[node] = [*gone] if node in self.last_use else [node, *gone]
        return found


def _tensor(module: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(module.get_submodule(owner(name)), name.rpartition(".")[2])
    return found
