"""Cuts by memory: the set of K-1 cuts with the lowest predicted peak of a training step, heads and decoders included.

The places a graph can be cut at make it a chain of pieces. One pass over the graph on fake tensors, piece by piece, forward and
backward, tells of each piece what it keeps for its backward and how high its own passing results reach. From those the peak of a module
made of any run of pieces follows by addition; the peak of a step is its largest module's. Minimising that over all cut sets is a
dynamic programme over the chain, so the answer is exact for the prediction. Among cut sets with that peak, the most even one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.cost.attribution import Attribution
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.stand_in import fake_copy
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations
from graphopt.passes.supervise.auxiliary import Auxiliary
from graphopt.passes.supervise.cuts import Place, demand, most_modules
from graphopt.passes.supervise.layout import Layout, layout_of

#: samples the pieces are measured with; bytes are per so many samples
BATCH = 8
#: with no number of modules given: the fewest whose peak is within this factor of the best of up to MOST_MODULES
GOOD_ENOUGH = 1.10
MOST_MODULES = 16

#: makes the auxiliary part for the layouts of a module's output and input; None where it cannot
Build = Callable[[Layout, Layout], Auxiliary | None]


@dataclass(frozen=True)
class Piece:
    """What one piece of the chain costs, in bytes for `BATCH` samples.

    Attributes:
        kept: held between its forward and its backward, its input and output aside.
        forward: the highest its forward reaches above what it found; its output counts, its input does not.
        backward: the highest its backward reaches, its input and output aside.
        saves: storages among its input and output that its backward needs, as number -> bytes.
        input, output: the storage's number and bytes; the same one where the piece only gives a view of its input.
        weighted: whether anything in it trains.
    """

    kept: int
    forward: int
    backward: int
    saves: dict[int, int] = field(repr=False)
    input: tuple[int, int]
    output: tuple[int, int]
    weighted: bool


def measure(graph: Graph, found: Sequence[Place], batch: int = BATCH) -> list[Piece]:
    """The pieces between the places, in order; one more than there are places."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module: Any = fake_copy(graph.module, mode)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    attribution = Attribution()
    ledger = Ledger(attribution)
    active = {n.name for n in activations(graph)}
    with mode:
        x = torch.empty(batch, *graph.input)
        ledger.set_kind((*module.parameters(), *module.buffers()), Kind.PARAMETER)
        ledger.set_kind((x,), Kind.INPUT)
        weighted = [p.weighted for p in found]
        pieces = _Pieces(module, ledger, {p.node.name for p in found}, active)
        with ledger, torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack):
            pieces.go(x)
        ledger.close()
    return pieces.made([*weighted, True])


class _Pieces(fx.Interpreter):
    """Runs the graph; at each place takes the piece's backward and goes on from a detached activation."""

    def __init__(self, module: fx.GraphModule, ledger: Ledger, ends: set[str], active: set[str]) -> None:
        super().__init__(module)
        self.ledger, self.ends, self.active = ledger, ends, active
        self.records: list[dict[str, Any]] = []
        self.pending: fx.Node | None = None

    def go(self, x: Tensor) -> None:
        self.entry, self.begun = x, len(self.ledger.events)
        self.run(x)

    def run_node(self, n: fx.Node) -> Any:
        if self.pending is not None:
            node, self.pending = self.pending, None
            self.entry = self.env[node] = self._close(self.env[node])
            # Only now is everything of the piece before gone, its input too.
            self.begun = len(self.ledger.events)
        if n.op == "output":
            self._close(n.args[0] if not isinstance(n.args[0], fx.Node) else self.env[n.args[0]])
            return None
        value = super().run_node(n)
        if n.name not in self.active and isinstance(value, Tensor) and value.requires_grad and n.op != "get_attr":
            value = value.detach().requires_grad_()
        if n.name in self.ends:
            self.pending = n
        return value

    def _close(self, value: Any) -> Any:
        ledger = self.ledger
        outputs = [t for t in _tensors(value) if t.is_floating_point()]
        turned = len(ledger.events)
        numbers = {ledger.index(t) for t in outputs}
        saved = {number for keeper, number, _ in ledger.saved if keeper() is not None and ledger.kinds[number] != Kind.PARAMETER}
        ledger.saved.clear()
        trained = [t for t in outputs if t.requires_grad]
        if trained:
            _Seed.apply(*trained).backward()
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        ledger.set_kind([p.grad for p in parameters], Kind.GRADIENT)  # type: ignore[misc]
        for parameter in parameters:
            parameter.grad = None
        self.records.append(
            {
                "events": (self.begun, turned, len(ledger.events)), "input": ledger.index(self.entry), "outputs": numbers,
                "saved": saved, "output": ledger.index(outputs[0]),
            }
        )  # fmt: skip
        if not isinstance(value, Tensor):
            return None
        return value.detach().requires_grad_()

    def made(self, weighted: list[bool]) -> list[Piece]:
        live = np.concatenate([[0], np.cumsum(self.ledger._changes((Kind.ACTIVATION, Kind.INPUT)))])
        sizes = self.ledger.sizes
        made = []
        for record, trains in zip(self.records, weighted, strict=True):
            begun, turned, ended = record["events"]
            before, level = int(live[begun]), int(live[turned])
            out = sum(sizes[n] for n in record["outputs"] - {record["input"]})
            made.append(
                Piece(
                    kept=max(0, level - before - out),
                    forward=int(live[begun : turned + 1].max()) - before,
                    # The output is held while the backward runs, here as in a module it ends.
                    backward=max(0, int(live[turned : ended + 1].max()) - before - out),
                    saves={n: sizes[n] for n in {*record["outputs"], record["input"]} & record["saved"]},
                    input=(record["input"], sizes[record["input"]]),
                    output=(record["output"], sizes[record["output"]]),
                    weighted=trains,
                )
            )
        return made


def peaks(pieces: Sequence[Piece], image: int, auxiliary: Callable[[int, int], float]) -> np.ndarray:
    """The predicted peak of a module of pieces i..j, as an (n, n) array of bytes; infinite where nothing in it trains.

    Args:
        image: bytes of the network's input, which lives throughout.
        auxiliary: what the auxiliary part adds at its highest behind piece j, in a module that starts at piece i.
    """
    n = len(pieces)
    table = np.full((n, n), math.inf)
    for i in range(n):
        own, size = pieces[i].input
        base = image + (size if i else 0)
        held: dict[int, int] = {}
        kept, forward, backward, weighted = 0, 0, 0, False
        for j in range(i, n):
            piece = pieces[j]
            weighted |= piece.weighted
            found = kept + sum(held.values())
            forward = max(forward, found + _if_new(piece.input, held, own) + piece.forward)
            held |= {number: b for number, b in piece.saves.items() if number != own}
            backward = max(backward, kept + sum(held.values()) + piece.backward)
            kept += piece.kept
            out = _if_new(piece.output, held, own)
            top = max(forward, backward + out)
            if j < n - 1 and weighted:
                top = max(top, kept + sum(held.values()) + out + auxiliary(i, j))
            if weighted:
                table[i, j] = base + top
    return table


def _if_new(storage: tuple[int, int], held: dict[int, int], own: int) -> int:
    """Bytes of a storage that is neither held already nor the module's own input."""
    number, size = storage
    return 0 if number in held or number == own else size


def best(table: np.ndarray, modules: int) -> tuple[float, tuple[int, ...]]:
    """The lowest peak K modules can have, and the last piece of each module but the last. Peak is infinite where there is no way."""
    lowest = _programme(table, modules, lambda a, b: max(a, b))
    if math.isinf(lowest[0]):
        return lowest
    # Of all ways that reach it, the most even.
    capped = np.where(table <= lowest[0], (table / lowest[0]) ** 2, math.inf)
    return lowest[0], _programme(capped, modules, lambda a, b: a + b)[1]


def _programme(table: np.ndarray, modules: int, join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
    n = len(table)
    cost = [float(table[0, j]) for j in range(n)]
    back: list[list[int]] = []
    for _ in range(1, modules):
        choice = [-1] * n
        after = [math.inf] * n
        for j in range(n):
            for i in range(1, j + 1):
                value = join(cost[i - 1], float(table[i, j]))
                if value < after[j]:
                    after[j], choice[j] = value, i - 1
        back.append(choice)
        cost = after
    if math.isinf(cost[-1]):
        return math.inf, ()
    ends, j = [], n - 1
    for choice in reversed(back):
        j = choice[j]
        ends.append(j)
    return cost[-1], tuple(reversed(ends))


def table_of(graph: Graph, found: Sequence[Place], build: Build) -> np.ndarray:
    """`peaks` of a graph's pieces between the places `found`, auxiliary parts by `build`; bytes for `BATCH` samples."""
    nodes = [graph.placeholder, *(p.node for p in found)]
    layouts = {n: layout_of(graph, n) for n in nodes}
    seen: dict[tuple[Layout, Layout], float] = {}

    def auxiliary(i: int, j: int) -> float:
        key = (layouts[nodes[j + 1]], layouts[nodes[i]])
        if key not in seen:
            made = build(*key)
            goal = graph.placeholder if made is not None and made.rebuilds_image else nodes[i]
            seen[key] = math.inf if made is None else auxiliary_peak(made, nodes[j + 1], goal)
        return seen[key]

    return peaks(measure(graph, found), 4 * BATCH * math.prod(graph.input), auxiliary)


def by_memory(graph: Graph, found: Sequence[Place], modules: int | None, build: Build, key: tuple[Any, ...]) -> tuple[Place, ...]:
    """The K-1 cuts with the lowest predicted peak; with no K, as many modules as bring the peak within 10 % of the best of up to 16.

    Args:
        key: of the graph's facts, to keep the predicted peaks under: they are the same for every K.

    Raises:
        PassError: there are fewer places than that.
    """
    if modules is not None:
        demand(found, modules)
    if not found:
        raise PassError("the graph has no cut with something to train on both sides")
    if key not in graph.facts:
        graph.facts[key] = table_of(graph, found, build)
    table = graph.facts[key]
    if modules is None:
        tried = [best(table, k) for k in range(2, min(MOST_MODULES, most_modules(found)) + 1)]
        lowest = min(peak for peak, _ in tried)
        ends = next(ends for peak, ends in tried if peak <= GOOD_ENOUGH * lowest)
    else:
        ends = best(table, modules)[1]
    if not ends:
        raise PassError("no such cuts have something to train in each module and a decoder that fits", fix="Use fewer modules")
    return tuple(found[e] for e in ends)


def auxiliary_peak(auxiliary: Auxiliary, output: fx.Node, goal: fx.Node) -> int:
    """Bytes that an auxiliary part adds at its highest, forward and backward, for `BATCH` samples."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(Attribution())
    made = fake_copy(auxiliary, mode).train()
    with mode:
        h, x = (torch.empty(BATCH, *n.meta["val"].shape[1:], requires_grad=n is output) for n in (output, goal))
        target = torch.zeros(BATCH, dtype=torch.long)
        ledger.set_kind((*made.parameters(), *made.buffers(), h, x, target), Kind.PARAMETER)
        with ledger:
            found = torch.autograd.grad(made(h, x, target), [h, *made.parameters()], allow_unused=True)
            ledger.set_kind([g for g in found[1:] if g is not None], Kind.GRADIENT)
            del found
        ledger.close()
    return ledger.peak((Kind.ACTIVATION,))[0]


class _Seed(torch.autograd.Function):
    """Sends a gradient of each input's shape into it, which nothing but autograd holds on to, as in a longer chain."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.kinds = [(i.shape, i.stride(), i.dtype) for i in inputs]
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in ctx.kinds)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []
