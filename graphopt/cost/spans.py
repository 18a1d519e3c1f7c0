"""Which operations to run again in the backward, so that a step's activations stay below a limit at the fewest FLOPs.

A graph is a chain of segments: blocks, and what lies between them. Of a segment everything is kept, or spans of its operations run again
in the backward; or a run of whole segments does. A span that runs again keeps what it reads from before it, and nothing else. It ends
with what its last operation saves: PyTorch stops a run in the backward there, so the last operation's own FLOPs do not count.

Two dynamic programmes choose, one over the operations of a segment, one over the segments. Both go forward through the step, with the bytes
that are held so far, and which of the storages that are read later are among them. Their answer is the best one for the prediction, but for
what `GRAIN` and `CHOICES` leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graphopt.cost.retention import Retention, Storages

#: ways whose held bytes differ by less than this share of the plain step's peak are taken as one, and the cheapest of them is kept
GRAIN = 1 / 400
#: choices inside one segment, with each set of known storages, that are tried in each combination of segments
CHOICES = 12
#: each limit is lower than the peak before it by this factor: peaks that are closer are taken as one
STEP = 0.99
#: FLOPs that a byte read or written counts as: so few that it only decides between choices with the same FLOPs
BYTE = 1e-6

#: first and last operation of what runs again
Span = tuple[int, int]


class Way(NamedTuple):
    """What is kept from some operation up to another.

    Attributes:
        price: FLOPs of what runs again, and `BYTE` for each byte that it reads or writes.
        held: bytes that are held more at its end than at its start. peak: the most bytes above its start.
        spans: what runs again. known: storages that are held at its end, and read later.
    """

    price: float = 0
    held: int = 0
    peak: int = 0
    spans: tuple[Span, ...] = ()
    known: Storages = frozenset()


@dataclass(frozen=True)
class _Rerun:
    """A span that runs again.

    Attributes:
        levels: the most bytes live in each of its operations, first in the forward, then in the backward, nothing being held before.
        first: by storage that is among them, from which operation on.
    """

    price: float
    inputs: Storages
    levels: NDArray[np.int64]
    first: Mapping[int, int]

    @classmethod
    def of(cls, retention: Retention, first: int, last: int) -> _Rerun:
        """What running these operations again takes."""
        inputs, operations = retention.inputs(first, last), retention.operations[first : last + 1]
        since = dict.fromkeys(inputs, 0)
        live, levels, entry = retention.bytes(inputs), [], operations[-1].entry
        for place, operation in enumerate(operations):
            new = [number for number in operation.saved if number not in since]
            since.update(dict.fromkeys(new, place))
            live += sum(retention.sizes[number] for number in new)
            levels.append((live + operation.forward + entry, live + operation.backward))
        flops, moved = retention.again(first, last)
        return cls(flops + BYTE * moved, inputs, np.array(levels, np.int64).T, since)

    def bytes(self, known: Storages, sizes: Sequence[int]) -> tuple[int, int]:
        """Bytes that it holds, and its peak, besides those of the storages that are held before."""
        shared = known & self.first.keys()
        less = np.zeros(self.levels.shape[1], np.int64)
        for number in shared:
            less[self.first[number]] += sizes[number]
        held = sum(sizes[number] for number in self.inputs - shared)
        return held, max(held, int((self.levels - np.cumsum(less)).max()))


#: from a place, with what is known there: the ways on, each with the place where it ends
Moves = Callable[[int, Storages], Sequence[tuple[int, Way]]]


@dataclass(frozen=True)
class Spans:
    """Ways through the segments of a graph.

    Attributes:
        segments: first and last operation of each, in order, without gaps.
        free: of each segment, whether it may run again, whole or in part.
    """

    retention: Retention
    segments: tuple[Span, ...]
    free: tuple[bool, ...]

    @cached_property
    def _later(self) -> list[Storages]:
        """Before each operation and at the end: the storages that are read or saved from there on."""
        later = [frozenset[int]()]
        for place in range(len(self.retention.operations) - 1, -1, -1):
            operation = self.retention.operations[place]
            later.append(later[-1] | operation.saved | self.retention.inputs(place, place))
        return later[::-1]

    def kept(self, place: int, known: Storages) -> Way:
        """An operation that keeps what it saves."""
        operation = self.retention.operations[place]
        held = self.retention.bytes(operation.saved - known)
        peak = held + max(operation.forward, operation.backward, 0)
        return Way(0, held, peak, (), (known | operation.saved) & self._later[place + 1])

    def again(self, first: int, last: int, known: Storages) -> Way:
        """A span that runs again."""
        if (first, last) not in self._runs:
            self._runs[first, last] = _Rerun.of(self.retention, first, last)
        run = self._runs[first, last]
        held, peak = run.bytes(known, self.retention.sizes)
        return Way(run.price, held, peak, ((first, last),), (known | run.inputs) & self._later[last + 1])

    @cached_property
    def _runs(self) -> dict[Span, _Rerun]:
        """The spans that were looked at."""
        return {}

    @cached_property
    def _ends(self) -> dict[int, list[int]]:
        """The last operations of the spans that start at an operation, and that end inside its segment with something saved."""
        found = {}
        for (first, last), free in zip(self.segments, self.free, strict=True):
            for start in range(first, last + 1) if free else ():
                if self.retention.operations[start].moved:
                    found[start] = [end for end in range(start + 1, last + 1) if self._useful(start, end)]
        return found

    @cached_property
    def _written(self) -> dict[int, int]:
        """The last operation that writes into each storage in place."""
        return {number: place for place, operation in enumerate(self.retention.operations) for number in operation.written}

    def _useful(self, first: int, last: int) -> bool:
        """Whether a span ends with something saved, and nothing from its start on writes into what it reads from before it."""
        if not self.retention.operations[last].saved:
            return False
        return all(self._written.get(number, -1) < first for number in self.retention.inputs(first, last))

    def _inside(self, place: int, known: Storages) -> list[tuple[int, Way]]:
        ends = self._ends.get(place, ())
        return [(place + 1, self.kept(place, known)), *((end + 1, self.again(place, end, known)) for end in ends)]

    def _moves(self, number: int, known: Storages) -> list[tuple[int, Way]]:
        """The ways on from the start of a segment: through it, or with a run of segments that runs again."""
        first, last = self.segments[number]
        ends = explore(first, last + 1, known, self._inside, self.grain)
        found = [(number + 1, way) for front in ends for way in front.thinned()]
        for other in range(number, len(self.segments)):
            if not self.free[other]:
                break
            found.append((other + 1, self.again(first, self.segments[other][1], known)))
        return found

    @cached_property
    def moves(self) -> Moves:
        """`_moves`, each worked out once."""
        known_moves: dict[tuple[int, Storages], list[tuple[int, Way]]] = {}

        def moves(number: int, known: Storages) -> list[tuple[int, Way]]:
            if (number, known) not in known_moves:
                known_moves[number, known] = self._moves(number, known)
            return known_moves[number, known]

        return moves

    @cached_property
    def grain(self) -> float:
        """Bytes that are taken as equal: of the peak with everything kept."""
        known, held, peak = self.retention.always, self.retention.bytes(self.retention.always), 0
        for place in range(len(self.retention.operations)):
            way = self.kept(place, known)
            held, peak, known = held + way.held, max(peak, held + way.peak), way.known
        return GRAIN * peak

    def cheapest(self, limit: float) -> Way | None:
        """The way with the fewest FLOPs whose predicted peak is at most `limit` bytes; None if there is none."""
        always = self.retention.always
        base = self.retention.bytes(always)
        fronts = explore(0, len(self.segments), always, self.moves, self.grain, limit - base)
        found = [way for front in fronts if (way := front.way(0)).peak + base <= limit]
        chosen = min(found, key=lambda way: (way.price, way.peak), default=None)
        return chosen and chosen._replace(peak=chosen.peak + base)

    def choices(self) -> Iterator[Way]:
        """The cheapest ways, from the one that runs nothing again to the one with the lowest peak."""
        limit = float("inf")
        while (found := self.cheapest(limit)) is not None:
            yield found
            limit = STEP * found.peak


@dataclass(frozen=True)
class Front:
    """Ways to one place with the same known storages: the cheaper, the more is held.

    Attributes:
        price, held, peak: of each way. source, index: of each, the number of the step that it came by, and which way of the front before.
        steps: the front before, and the way that each of its ways was continued with.
    """

    price: NDArray[np.float64]
    held: NDArray[np.int64]
    peak: NDArray[np.int64]
    source: NDArray[np.int64]
    index: NDArray[np.int64]
    steps: Sequence[tuple[Front, Way]]
    known: Storages

    @classmethod
    def start(cls, known: Storages) -> Front:
        """The one way that has not gone anywhere."""
        zero = np.zeros(1, np.int64)
        return cls(np.zeros(1), zero, zero, zero, zero, (), known)

    @classmethod
    def merged(cls, steps: Sequence[tuple[Front, Way]], limit: float, grain: float) -> Front:
        """Every way of each front continued, but for those that others beat, and those that exceed the limit."""
        known = steps[0][1].known
        price = np.concatenate([front.price + way.price for front, way in steps])
        held = np.concatenate([front.held + way.held for front, way in steps])
        peak = np.concatenate([np.maximum(front.peak, front.held + way.peak) for front, way in steps])
        source = np.concatenate([np.full(len(front.price), number) for number, (front, _) in enumerate(steps)])
        index = np.concatenate([np.arange(len(front.price)) for front, _ in steps])
        order = np.lexsort((peak, held, price))
        order = order[peak[order] <= limit]
        level = held[order] // grain
        order = order[np.concatenate([[True], level[1:] < np.minimum.accumulate(level)[:-1]])] if len(order) else order
        return cls(price[order], held[order], peak[order], source[order], index[order], steps, known)

    def way(self, number: int) -> Way:
        """One of the ways, from its start."""
        spans: list[Span] = []
        front, place = self, number
        while front.steps:
            before, step = front.steps[front.source[place]]
            spans[:0] = step.spans
            front, place = before, front.index[place]
        return Way(float(self.price[number]), int(self.held[number]), int(self.peak[number]), tuple(spans), self.known)

    def thinned(self) -> list[Way]:
        """At most `CHOICES` of the ways, evenly by their number; the cheapest and the one that holds least are among them."""
        chosen = {round(k * (len(self.price) - 1) / (CHOICES - 1)) for k in range(CHOICES)}
        return [self.way(number) for number in sorted(chosen)]


def explore(first: int, end: int, known: Storages, moves: Moves, grain: float, limit: float = float("inf")) -> list[Front]:
    """The best ways from a place to another, a front for each set of known storages there. None has a peak above `limit`."""
    steps: dict[int, dict[Storages, list[tuple[Front, Way]]]] = {first: {known: [(Front.start(known), Way(known=known))]}}
    for place in range(first, end):
        for chunk in steps.pop(place, {}).values():
            front = Front.merged(chunk, limit, grain)
            for target, way in moves(place, front.known) if len(front.price) else ():
                steps.setdefault(target, {}).setdefault(way.known, []).append((front, way))
    fronts = [Front.merged(chunk, limit, grain) for chunk in steps.get(end, {}).values()]
    return [front for front in fronts if len(front.price)]
