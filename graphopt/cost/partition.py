"""Cuts by memory or time: which parts of a chain give the lowest predicted peak of a training step, or the fastest slowest part.

The cut candidates of a graph make it a chain of pieces. One run of the graph on fake tensors, forward and backward piece by piece, gives
for each piece what it saves for its backward, how much memory its own intermediate results take, and the work that its time depends on.
The peak and the seconds of a part made of any run of pieces follow by addition, and a dynamic programme over the chain minimises the
largest over all sets of cuts, so the answer is exact for the prediction. There are two ways to run a step in parts: each part's backward
right after its forward (local supervision), or each part run again in the backward pass (checkpointing).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from graphopt.cost.attribution import Attribution
from graphopt.cost.figures import Work
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.loss import autocast
from graphopt.errors import NeedsValuesError, PassError, first_line
from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode
from graphopt.ir.flow import descendants
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import dtype_of, samples
from graphopt.ir.nodes import activations, writes_in_place
from graphopt.ir.partition import CutCandidate, cut_candidates, most_parts, require_parts
from graphopt.ir.shapes import tensors_in, uncached

#: samples that the pieces are measured with; bytes are for so many samples
BATCH = 8
#: with no number of parts given: the fewest whose peak is within this factor of the best of up to MOST_PARTS
GOOD_ENOUGH = 1.10
MOST_PARTS = 16

#: bytes or seconds; `table[i, j]` is the peak, or the time, of a part made of the pieces from i to j
Table = NDArray[np.float64]
Storage = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """What one piece of the chain costs: bytes, and work.

    Attributes:
        saved: held between its forward and its backward, its input and output excluded.
        forward: the highest that its forward reaches above what was there before; its output counts, its input does not.
        backward: the highest that its backward reaches, its input and output excluded.
        saved_ends: storages among its input and output that its backward needs, as number -> bytes.
        input, output: the storage's number and bytes; the same one where the piece only gives a view of its input.
        work: of its forward and backward.
        flops: of its forward.
    """

    saved: int
    forward: int
    backward: int
    saved_ends: dict[int, int] = field(repr=False)
    input: Storage
    output: Storage
    has_parameters: bool
    work: Work
    flops: int = 0


def pieces_of(graph: Graph) -> list[Piece]:
    """The pieces between all cut candidates of a graph, measured once."""
    return graph.cached(_pieces_of)


def _pieces_of(graph: Graph) -> list[Piece]:
    return measure(graph, cut_candidates(graph))


def measure(
    graph: Graph, candidates: Sequence[CutCandidate], *, batch: int = BATCH, amp: str | None = None, isolated: bool = False
) -> list[Piece]:
    """The pieces between the candidates, in order; one more than there are candidates.

    Args:
        batch: samples. amp: dtype of autocast. isolated: no piece computes a gradient of its input, as the first one of a module.
    """
    with on_fakes(graph, batch, fix="Compute shapes and branches from sizes, not from values, or divide the backbone by blocks") as step:
        module, ledger, given = step
        active = activations(graph) & descendants([graph.placeholder])
        run = _PieceByPiece(module, ledger, {c.node.name for c in candidates}, {n.name for n in active}, isolated=isolated)
        with ledger, autocast(amp), torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack):
            run.start(*given)
    return run.pieces([*(c.has_parameters for c in candidates), True])


@contextmanager
def on_fakes(graph: Graph, batch: int, *, fix: str) -> Iterator[tuple[fx.GraphModule, Ledger, tuple[Tensor, ...]]]:
    """Gives a copy of a graph on fake tensors, all of whose parameters train, with a ledger and the inputs of a step of `batch` samples.

    Raises NeedsValuesError, with `fix`, if what is done with it needs values of tensors.
    """
    mode = FakeMode()
    module = fake_copy(graph.module, mode)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    ledger = Ledger(Attribution())
    try:
        with uncached(graph.module), mode:
            given = samples(graph.input, batch, partial(torch.empty, dtype=dtype_of(module)))
            ledger.set_kind((*module.parameters(), *module.buffers()), Kind.PARAMETER)
            ledger.set_kind(given, Kind.INPUT)
            yield module, ledger, given
            ledger.close()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = f"the backbone's Python looks at tensor values, which a forecast does not have: {first_line(error)}"
        raise NeedsValuesError(what, fix=fix) from error


@dataclass(frozen=True)
class _Record:
    """Where a piece's forward and backward begin and end among the ledger's events, numbers of storages, and its work."""

    begin: int
    turn: int
    end: int
    input: int
    outputs: list[int]
    saved: set[int]
    work: Work
    flops: int


class _PieceByPiece(fx.Interpreter):
    """Runs the graph; at each cut it runs the piece's backward and goes on from a detached activation."""

    def __init__(self, module: fx.GraphModule, ledger: Ledger, ends: set[str], active: set[str], *, isolated: bool) -> None:
        super().__init__(module)
        self.ledger, self.ends, self.active, self.isolated = ledger, ends, active, isolated
        #: parameters with a gradient of the piece's backward
        self.differentiated: list[Tensor] = []
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(self.differentiated.append)
        self.records: list[_Record] = []
        self.pending: fx.Node | None = None
        self.flops = 0

    def start(self, x: Tensor, *others: Tensor) -> None:
        self.entry, self.begin, self.done = x, len(self.ledger.events), self.ledger.work
        self.run(x, *others)

    def run_node(self, n: fx.Node) -> Any:
        if self.pending is not None:
            node, self.pending = self.pending, None
            self._close(self.env[node])
            self.entry = self.env[node] = self.env[node].detach().requires_grad_(not self.isolated)
            # Only now is everything of the piece before gone, its input too.
            self.begin, self.done = len(self.ledger.events), self.ledger.work
        if n.op == "output":
            return self._close(fx.node.map_arg(n.args[0], self.env.__getitem__))
        value = super().run_node(n)
        # What does not depend on the image is a leaf, so that each piece that reads it can run backward; one written into cannot be.
        computed = n.name not in self.active and n.op != "get_attr" and isinstance(value, Tensor) and value.requires_grad
        if computed and not any(writes_in_place(self.module, user) for user in n.users):
            value = value.detach().requires_grad_()
        if n.name in self.ends:
            self.pending = n
        return value

    def _close(self, value: Any) -> None:
        ledger = self.ledger
        outputs = [t for t in tensors_in(value) if t.is_floating_point()]
        turn, before = len(ledger.events), self.flops
        self.flops = sum(forward for forward, *_ in ledger.attribution.totals.values())
        numbers = [ledger.index(t) for t in outputs]
        saved = {number for keeper, number, _ in ledger.saved if keeper() is not None and ledger.kinds[number] != Kind.PARAMETER}
        ledger.saved.clear()
        trained = [t for t in outputs if t.requires_grad]
        if trained:
            with ledger.uncounted():
                seed = Seed.apply(ledger, *trained)
                unit = torch.ones_like(seed)
            torch.autograd.backward(seed, unit)
        work = ledger.work - self.done
        for parameter in self.differentiated:
            if parameter.grad is not None:
                ledger.set_kind((parameter.grad,), Kind.GRADIENT)
                parameter.grad = None
        self.differentiated.clear()
        record = _Record(self.begin, turn, len(ledger.events), ledger.index(self.entry), numbers, saved, work, self.flops - before)
        self.records.append(record)

    def pieces(self, have_parameters: Iterable[bool]) -> list[Piece]:
        live = np.concatenate([[0], self.ledger.live((Kind.ACTIVATION, Kind.INPUT))])
        sizes = self.ledger.sizes
        found = []
        for record, has_parameters in zip(self.records, have_parameters, strict=True):
            before, level = int(live[record.begin]), int(live[record.turn])
            # The output is held while the backward runs, here as in the part that it ends.
            output = sum(sizes[n] for n in set(record.outputs) - {record.input})
            found.append(
                Piece(
                    saved=max(0, level - before - output),
                    forward=int(live[record.begin : record.turn + 1].max()) - before,
                    backward=max(0, int(live[record.turn : record.end + 1].max()) - before - output),
                    saved_ends={n: sizes[n] for n in {*record.outputs, record.input} & record.saved},
                    input=(record.input, sizes[record.input]),
                    output=(record.outputs[0], sizes[record.outputs[0]]),
                    has_parameters=has_parameters,
                    work=record.work,
                    flops=record.flops,
                )
            )
        return found


class Seed(torch.autograd.Function):
    """Sends a gradient of each input's shape into it, which nothing but autograd holds, as in a longer chain."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, *inputs: Tensor) -> Tensor:
        ctx.ledger, ctx.kinds = ledger, [(i.shape, i.stride(), i.dtype) for i in inputs]
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        with ctx.ledger.uncounted():
            return (None, *(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in ctx.kinds))


def peaks(pieces: Sequence[Piece], always: int, auxiliary: Callable[[int, int], float] | None = None) -> Table:
    """The predicted peak of every part: its forward, then its backward. Infinite where it has no parameters.

    Args:
        always: bytes that are live throughout but in the first part, whose input they are (the images).
        auxiliary: what an auxiliary part after piece j adds at its highest, in a part that starts at piece i (the last has none).
    """
    n = len(pieces)
    table = np.full((n, n), math.inf)
    for i in range(n):
        own, size = pieces[i].input
        base = size + (always if i else 0)
        held: set[int] = set()
        # `saved` includes what is held at the pieces' ends.
        saved, forward, backward, has_parameters = 0, 0, 0, False
        for j, piece in enumerate(pieces[i:], start=i):
            has_parameters |= piece.has_parameters
            forward = max(forward, saved + _if_new(piece.input, held, own) + piece.forward)
            new = [number for number in piece.saved_ends if number != own and number not in held]
            held.update(new)
            saved += sum(piece.saved_ends[number] for number in new)
            backward = max(backward, saved + piece.backward)
            saved += piece.saved
            output = _if_new(piece.output, held, own)
            if has_parameters:
                table[i, j] = base + max(forward, backward + output)
                if auxiliary is not None and j < n - 1:
                    table[i, j] = max(table[i, j], base + saved + output + auxiliary(i, j))
    return table


def _if_new(storage: Storage, held: set[int], own: int) -> int:
    """Bytes of a storage that is neither held already nor the part's own input."""
    number, size = storage
    return 0 if number in held or number == own else size


def best(table: Table, parts: int) -> tuple[float, tuple[int, ...]]:
    """The smallest that the largest part of a division can be, infinite where there is no way.

    Of bytes, that is the peak of a step in which each part goes forward and backward before the next one starts; of seconds, the time of
    the slowest. With it comes the last piece of each part but the last: of all ways with that largest part, the most even.
    """
    lowest, ends = _programme(table, parts, lambda before, own, _: max(before, own))
    if math.isinf(lowest):
        return lowest, ends
    even = np.where(table <= lowest, table**2, math.inf)
    return lowest, _programme(even, parts, lambda before, own, _: before + own)[1]


def assign(seconds: Sequence[float], ranks: int) -> tuple[range, ...]:
    """The modules of each rank, in runs: of all ways, the one with the fastest slowest rank; of those, the most even.

    `seconds` are those of each module's step. With more ranks than modules, the first ones have none.
    """
    modules = len(seconds)
    idle = max(0, ranks - modules)
    ends = best(sums(seconds), ranks - idle)[1]
    return (range(0),) * idle + tuple(range(a + 1, b + 1) for a, b in pairwise([-1, *ends, modules - 1]))


def sums(later: Sequence[float], first: Sequence[float] | None = None, trains: Sequence[bool] = ()) -> Table:
    """What the pieces of every part add up to, from the figure of each.

    Up to the first piece of a part that `trains`, no gradient of an input is computed: these count with their figure in `first`.
    """
    n = len(later)
    table = np.full((n, n), math.inf)
    for i in range(n):
        turn = next((k + 1 for k in range(i, n) if trains[k]), n) if first else i
        table[i, i:] = np.cumsum([*(first or ())[i:turn], *later[turn:]])
    return table


def best_recomputed(pieces: Sequence[Piece], parts: int) -> tuple[float, tuple[int, ...]]:
    """The lowest peak of a step in which each part runs again in the backward pass. Returns the same as `best`.

    When a part runs again, the inputs of all parts before it are live. So the programme goes over the chain from its end: a part adds its
    input to whatever comes after it.
    """
    inputs = [p.input[1] for p in reversed(pieces)]
    table = peaks([replace(p, has_parameters=True) for p in pieces], 0)[::-1, ::-1].T
    peak, ends = _programme(table, parts, lambda after, own, first: max(after + inputs[first], own))
    return peak, tuple(len(pieces) - 2 - e for e in reversed(ends))


def _programme(table: Table, parts: int, join: Callable[[float, float, int], float]) -> tuple[float, tuple[int, ...]]:
    """The lowest cost of dividing the chain, and where each part but the last ends.

    `join` gives the cost with a part from the cost up to it, its own, and its last piece.
    """
    lowest: list[tuple[float, tuple[int, ...]]] = [(float(own), ()) for own in table[0]]
    for _ in range(1, parts):
        longer: list[tuple[float, tuple[int, ...]]] = []
        for j in range(len(table)):
            cost, i = min(((join(lowest[i - 1][0], float(table[i, j]), j), i) for i in range(1, j + 1)), default=(math.inf, 1))
            longer.append((cost, (*lowest[i - 1][1], i - 1)))
        lowest = longer
    return lowest[-1] if math.isfinite(lowest[-1][0]) else (math.inf, ())


def by_largest(candidates: Sequence[CutCandidate], table: Table, parts: int | None) -> tuple[CutCandidate, ...]:
    """The cuts with the smallest largest part; without a number, as many as bring it within 10 % of the best of up to 16 parts.

    `table` has the bytes or seconds of the parts between the candidates.
    """
    require_parts(candidates, parts or 2)
    if parts is None:
        tried = [best(table, k) for k in range(2, min(MOST_PARTS, most_parts(candidates)) + 1)]
        lowest = min(peak for peak, _ in tried)
        ends = next(ends for peak, ends in tried if peak <= GOOD_ENOUGH * lowest)
    else:
        ends = best(table, parts)[1]
    if not ends:
        raise PassError("no such cuts give each part parameters and an auxiliary part that fits", fix="Ask for fewer parts")
    return tuple(candidates[e] for e in ends)
