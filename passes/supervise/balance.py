"""Tables to choose cuts by: what a module between any two cut candidates would hold and take, its head and decoder included."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from graphopt import Graph, PassError
from graphopt.cost.attribution import Attribution
from graphopt.cost.figures import Work
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.loss import autocast
from graphopt.cost.partition import BATCH, Table, best, measure, peaks, pieces_of, sums
from graphopt.cost.rates import TimedStep
from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode
from graphopt.ir.inputs import sample_numbers
from graphopt.ir.nodes import parameters_read
from graphopt.ir.partition import CutCandidate, cut_candidates
from graphopt.passes.supervise.auxiliary import Auxiliary, Weights
from graphopt.passes.supervise.building import Builder, Copied
from graphopt.passes.supervise.layout import ActivationLayout, layout_of
from graphopt.units import show_size


class Part(NamedTuple):
    """An auxiliary part, what it adds to a module at its highest in bytes of activations, and the work of its forward and backward."""

    auxiliary: Auxiliary
    peak: int
    work: Work


def parts_of(graph: Graph, builder: Builder, *, batch: int, amp: str | None = None) -> Callable[[int, int], Part | None]:
    """The auxiliary part of a module from its first and last piece; None if there can be none.

    An `ahead` head is as deep as in the first module: the tables do not know a module's number.
    """
    image = builder.value.decoder == "image"
    nodes = [graph.placeholder, *(c.node for c in cut_candidates(graph))]
    layouts = [layout_of(graph, n) for n in nodes]
    shapes = {layout: tuple(n.meta["val"].shape[1:]) for n, layout in zip(nodes, layouts, strict=True)}

    @functools.cache
    def measured(output: ActivationLayout, goal: ActivationLayout, copied: Copied) -> Part:
        with torch.device("meta"):
            auxiliary = builder.part(copied, output, goal, Weights(1.0, 1.0))
        return _measured(auxiliary, (batch, *shapes[output]), (batch, *shapes[goal]), amp)

    @functools.cache
    def between(first: int, last: int) -> Part | None:
        end, output, goal = nodes[last + 1].name, layouts[last + 1], layouts[0] if image else layouts[first]
        return None if builder.incompatibility(end, output, goal) else measured(output, goal, builder.copied(end))

    return between


def predicted_peaks(graph: Graph, builder: Builder) -> Table:
    """The predicted peak of each module's activations, in bytes for `BATCH` samples; infinite where there can be no module."""
    between = parts_of(graph, builder, batch=BATCH)

    def highest(first: int, last: int) -> float:
        part = between(first, last)
        return math.inf if part is None else part.peak

    return peaks(pieces_of(graph), 4 * BATCH * sample_numbers(graph.input), highest)


def predicted_seconds(graph: Graph, builder: Builder, step: TimedStep, *, limit: int | None, modules: int) -> Table:
    """The predicted seconds of each module's step on the machine: forward, backward and update; infinite where there can be no module.

    So it is where a process with the module alone would hold more than `limit` bytes: activations, parameters, gradients and optimizer
    state. Raises PassError if no division into `modules` stays within it.
    """
    between = parts_of(graph, builder, batch=step.micro_batch, amp=step.amp)
    candidates = cut_candidates(graph)
    first, later = (measure(graph, candidates, batch=step.micro_batch, amp=step.amp, isolated=isolated) for isolated in (True, False))
    updates = [step.update(parameters) for parameters in _parameters(graph, candidates)]
    isolated, inner = ([step.seconds(p.work, u) for p, u in zip(pieces, updates, strict=True)] for pieces in (first, later))
    seconds = sums(inner, isolated, [p.has_parameters for p in later])

    def highest(first: int, last: int) -> float:
        part = between(first, last)
        return math.inf if part is None else part.peak

    held = sums([u.bytes for u in updates]) + peaks(later, 4 * step.micro_batch * sample_numbers(graph.input), highest)
    update_of = functools.cache(lambda auxiliary: step.update(auxiliary.parameters()))
    for i, j in np.argwhere(np.isfinite(held[:, :-1])).tolist():
        part = between(i, j)
        assert part is not None
        update = update_of(part.auxiliary)
        seconds[i, j] += step.seconds(part.work, update)
        held[i, j] += update.bytes
    if limit is not None and (lowest := best(held, modules)[0]) > limit:
        what = f"no {modules} modules keep their steps of {step.batch} samples within {show_size(limit)}"
        raise PassError(what, where="limit", fix=f"The lowest is {show_size(lowest)}: raise limit, or use more modules")
    allowed = np.isfinite(held) if limit is None else held <= limit
    return np.where(allowed, seconds, math.inf)


def _parameters(graph: Graph, candidates: Sequence[CutCandidate]) -> Iterator[list[nn.Parameter]]:
    """The parameters of each piece; one that several pieces read is the first one's."""
    known: set[int] = set()
    for start, end in pairwise([0, *(graph.order[c.node] + 1 for c in candidates), len(graph.nodes)]):
        read = {id(p): p for node in graph.nodes[start:end] for _, p in parameters_read(graph.module, node)}
        yield [p for key, p in read.items() if key not in known]
        known |= read.keys()


def _measured(auxiliary: Auxiliary, output: tuple[int, ...], goal: tuple[int, ...], amp: str | None) -> Part:
    mode = FakeMode()
    ledger = Ledger(Attribution())
    part = fake_copy(auxiliary, mode).train()
    with mode, autocast(amp):
        h, x = torch.empty(output, requires_grad=True), torch.empty(goal)
        target = torch.zeros(output[0], dtype=torch.long)
        ledger.set_kind((*part.parameters(), *part.buffers(), h, x, target), Kind.PARAMETER)
        with ledger:
            gradients = torch.autograd.grad(part(h, x, target), [h, *part.parameters()], allow_unused=True)
            ledger.set_kind([g for g in gradients[1:] if g is not None], Kind.GRADIENT)
            del gradients
        ledger.close()
    return Part(auxiliary, ledger.peak((Kind.ACTIVATION,))[0], ledger.work)
