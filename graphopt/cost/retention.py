"""What each operation of a graph keeps for the backward, found in one training step on fake tensors.

From it follows, by addition, what is held while any choice of operations runs again in the backward (`graphopt.cost.recomputation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.cost.ledger import Kind, Ledger, OperatorCall
from graphopt.cost.partition import BATCH, Seed, on_fakes
from graphopt.ir.grad_mode import recording
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import writes_in_place
from graphopt.ir.shapes import tensors_in

#: live bytes of these count
_COUNTED = (Kind.ACTIVATION, Kind.INPUT)
#: numbers of storages
Storages = frozenset[int]


@dataclass
class Operation:
    """One node of a graph in a training step. Bytes are above what all operations up to and with this one save.

    Attributes:
        saved: storages that its backward needs. outputs: storages of its value. written: storages that it writes into in place.
        flops, moved: FLOPs, and bytes read and written, of its forward. flops_again, moved_again: of these, what runs before it has
            saved its last tensor: where a run in the backward ends.
        forward, backward: the most bytes live in its forward and backward. entry: when its backward starts: gradients.
    """

    node: fx.Node
    saved: Storages = frozenset()
    outputs: Storages = frozenset()
    written: Storages = frozenset()
    flops: int = 0
    moved: int = 0
    flops_again: int = 0
    moved_again: int = 0
    forward: int = 0
    backward: int = 0
    entry: int = 0


@dataclass(frozen=True)
class Retention:
    """The operations of a graph in execution order, and the bytes of the storages that they name.

    Attributes:
        always: storages that a training loop holds throughout: the network's inputs.
    """

    operations: tuple[Operation, ...]
    sizes: Sequence[int] = field(repr=False)
    always: Storages

    def bytes(self, storages: Storages) -> int:
        """What these storages take."""
        return sum(self.sizes[number] for number in storages)

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Where each node is in the sequence."""
        return {operation.node: place for place, operation in enumerate(self.operations)}

    @cached_property
    def _work(self) -> tuple[list[int], list[int]]:
        operations = self.operations
        return [0, *accumulate(o.flops for o in operations)], [0, *accumulate(o.moved for o in operations)]

    def again(self, first: int, last: int) -> tuple[int, int]:
        """FLOPs and moved bytes of running the operations from `first` to `last` again, up to what is saved last."""
        place = next((k for k in range(last, first - 1, -1) if self.operations[k].saved), None)
        if place is None:
            return 0, 0
        flops, moved = self._work
        end = self.operations[place]
        return flops[place] - flops[first] + end.flops_again, moved[place] - moved[first] + end.moved_again

    @cached_property
    def _sources(self) -> list[list[tuple[int, Storages]]]:
        """For each operation, where what it reads comes from, and its storages."""
        place = self.position
        known = ([place[n] for n in operation.node.all_input_nodes if n in place] for operation in self.operations)
        return [[(k, self.operations[k].outputs) for k in places if self.operations[k].outputs] for places in known]

    def inputs(self, first: int, last: int) -> Storages:
        """Storages of activations that the operations from `first` to `last` read from before them."""
        found = {k: outputs for sources in self._sources[first : last + 1] for k, outputs in sources if k < first}
        return frozenset[int]().union(*found.values())


@recording()
def retention(graph: Graph) -> Retention:
    """Measures a graph whose parameters all train. Raises NeedsValuesError if it cannot run on fake tensors."""
    with on_fakes(graph, BATCH, fix="Compute shapes and branches from sizes, not from values") as (module, ledger, given):
        step = _NodeByNode(module, graph, ledger)
        always = frozenset(ledger.index(x) for x in given)
        with ledger:
            step.take(*given)
    return step.found(always)


class _NodeByNode(fx.Interpreter):
    """Takes one step; every node is a path of its own for the attribution, in the backward, too."""

    def __init__(self, module: fx.GraphModule, source: Graph, ledger: Ledger) -> None:
        super().__init__(module)
        self.ledger = ledger
        ledger.inside = self._noted
        nodes = [n for n in source.nodes if n.op not in ("placeholder", "output")]
        self.operations = {n.name: Operation(n) for n in nodes}
        #: (number of events so far, the node that an operator belongs to)
        self.marks: list[tuple[int, str]] = []
        self.packed: dict[str, tuple[int, int]] = {}

    def _noted(self, _: OperatorCall) -> None:
        self.marks.append((len(self.ledger.events), self.ledger.attribution.path()))

    def _pack(self, tensor: Tensor) -> Any:
        name = self.ledger.attribution.path()
        self.packed[name] = (self._flops(name), self.ledger.moved)
        return self.ledger.pack(tensor)

    def _flops(self, name: str) -> int:
        return sum(self.ledger.attribution.totals[name])

    def take(self, *given: Tensor) -> None:
        """The step: the forward, and a backward from a gradient of each output."""
        ledger = self.ledger
        with torch.autograd.graph.saved_tensors_hooks(self._pack, ledger.unpack):
            output = self.run(*given)
        self.turn = len(ledger.events)
        for keeper, number, name in ledger.saved:
            if keeper() is not None and ledger.kinds[number] in _COUNTED and name in self.operations:
                self.operations[name].saved |= {number}
        trained = [t for t in tensors_in(output) if t.requires_grad]
        if trained:
            with ledger.uncounted():
                seed = Seed.apply(ledger, *trained)
                unit = torch.ones_like(seed)
            torch.autograd.backward(seed, unit)
        ledger.set_kind((p.grad for p in self.module.parameters() if p.grad is not None), Kind.GRADIENT)

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node, and notes its work and what it gives."""
        operation = self.operations.get(n.name)
        if operation is None:
            return super().run_node(n)
        attribution, moved = self.ledger.attribution, self.ledger.moved
        given = [self.env[i] for i in n.all_input_nodes]
        attribution.push(n.name)
        try:
            value = super().run_node(n)
        finally:
            attribution.pop()
        operation.flops, operation.moved = self._flops(n.name), self.ledger.moved - moved
        if n.name in self.packed:
            flops, reached = self.packed[n.name]
            operation.flops_again, operation.moved_again = flops, reached - moved
        operation.outputs = self._storages(value)
        if writes_in_place(self.module, n):
            operation.written = frozenset[int]().union(*map(self._storages, given)) & operation.outputs
        return value

    def _storages(self, value: Any) -> Storages:
        numbers = {self.ledger.index(t) for t in tensors_in(value)}
        return frozenset(number for number in numbers if self.ledger.kinds[number] in _COUNTED)

    def found(self, always: Storages) -> Retention:
        """What was measured; live bytes are those above what was saved by then."""
        operations, sizes, events = tuple(self.operations.values()), self.ledger.sizes, self.ledger.events
        live = np.concatenate([[0], self.ledger.live(_COUNTED)])
        held, seen, total = dict[str, int](), set(always), sum(sizes[number] for number in always)
        for operation in operations:
            total += sum(sizes[number] for number in operation.saved - seen)
            seen |= operation.saved
            held[operation.node.name] = total
        begin, entered = 0, set[str]()
        for end, name in self.marks:
            if (known := self.operations.get(name)) is not None:
                # What is freed before the first allocation belonged to the operation before.
                start = next((at for at in range(begin, end) if events[at] >= 0), end)
                level = int(live[start : end + 1].max()) - held[name]
                if end <= self.turn:
                    known.forward = max(known.forward, level)
                else:
                    known.backward = max(known.backward, level)
                    if name not in entered:
                        known.entry = max(0, int(live[start]) - held[name])
                        entered.add(name)
            begin = end
        return Retention(operations, sizes, always)
