"""The predicted peaks of locally supervised modules, their heads and decoders included."""

import math
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from graphopt.cost.attribution import Attribution
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.partition import BATCH, Table, peaks, pieces_of
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.ir.shapes import fake_copy
from graphopt.passes.supervise.auxiliary import Auxiliary
from graphopt.passes.supervise.layout import ActivationLayout, layout_of

#: makes the auxiliary part for the layouts of a module's output and input; None where there is none that fits
Build = Callable[[ActivationLayout, ActivationLayout], Auxiliary | None]


def peak_table(graph: Graph, build: Build) -> Table:
    """The predicted peak of each module between two of the graph's cut candidates, in bytes for `BATCH` samples."""
    nodes = [graph.placeholder, *(c.node for c in cut_candidates(graph))]
    layouts = {n: layout_of(graph, n) for n in nodes}
    known: dict[tuple[ActivationLayout, ActivationLayout], float] = {}

    def auxiliary(first: int, last: int) -> float:
        output, entry = nodes[last + 1], nodes[first]
        key = (layouts[output], layouts[entry])
        if key not in known:
            part = build(*key)
            goal = graph.placeholder if part is not None and part.rebuilds_image else entry
            known[key] = math.inf if part is None else _auxiliary_peak(part, output, goal)
        return known[key]

    return peaks(pieces_of(graph), 4 * BATCH * math.prod(graph.input), auxiliary)


def _auxiliary_peak(auxiliary: Auxiliary, output: Node, goal: Node) -> int:
    """Bytes that an auxiliary part adds at its highest, forward and backward, for `BATCH` samples."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(Attribution())
    part = fake_copy(auxiliary, mode).train()
    with mode:
        h, x = (torch.empty(BATCH, *n.meta["val"].shape[1:], requires_grad=n is output) for n in (output, goal))
        target = torch.zeros(BATCH, dtype=torch.long)
        ledger.set_kind((*part.parameters(), *part.buffers(), h, x, target), Kind.PARAMETER)
        with ledger:
            gradients = torch.autograd.grad(part(h, x, target), [h, *part.parameters()], allow_unused=True)
            ledger.set_kind([g for g in gradients[1:] if g is not None], Kind.GRADIENT)
            del gradients
        ledger.close()
    return ledger.peak((Kind.ACTIVATION,))[0]
