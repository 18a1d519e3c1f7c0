"""Which blocks to run again in the backward: so that activations stay within a share of their peak at the fewest FLOPs, or in segments.

The blocks are a chain. Each is kept (its activations are saved), or is part of a run of blocks that saves its input only and is run again
in the backward. When the backward reaches a run, what is held is: of every kept block before it, what it saves; of every run before it, its
input; and the run's own activations. So the peak of any choice follows by addition from one measurement of the blocks, and a dynamic
programme over the chain finds the cheapest one below a limit, exactly for the prediction.

Choices for all limits are found from the highest down, each limit just below the peak of the choice before. A smaller share therefore
never has the higher predicted peak.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal

from graphopt.cost.partition import Piece, Table, best_recomputed, measure, peaks
from graphopt.errors import NeedsValuesError, PassError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.ir.regions import Region

#: each limit is lower than the peak before it by this factor: peaks that are closer are taken as one
STEP = 0.995

#: names of the blocks in each run of blocks that runs again
Runs = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Choice:
    """What is run again in the chain up to some piece.

    Attributes:
        flops: of what is run again. held: bytes that are held from then on. peak: the highest so far, in bytes.
        runs: first and last piece of each run of pieces that is run again.
    """

    flops: int = 0
    held: float = 0.0
    peak: float = 0.0
    runs: tuple[tuple[int, int], ...] = ()


def cheapest(pieces: Sequence[Piece], table: Table, free: Sequence[bool], limit: float) -> Choice | None:
    """The choice with the fewest FLOPs whose predicted peak is at most `limit` bytes; None if there is none.

    Args:
        table: `peaks` of the pieces. free: whether a piece may be run again.
    """
    fronts: list[list[Choice]] = [[Choice()], *([] for _ in pieces)]
    flops = [0, *accumulate(piece.flops for piece in pieces)]
    for first, piece in enumerate(pieces):
        size = piece.input[1]
        for way in _best(fronts[first]):
            for last, again in _spans(first, free):
                # The table's peaks include the input, which stays from here on.
                peak = max(way.peak, way.held + float(table[first, last]))
                if peak > limit:
                    continue
                held, more = (0, flops[last + 1] - flops[first]) if again else (piece.saved, 0)
                runs = (*way.runs, (first, last)) if again else way.runs
                fronts[last + 1].append(Choice(way.flops + more, way.held + size + held, peak, runs))
    return min(fronts[-1], key=lambda way: (way.flops, way.peak), default=None)


def _spans(first: int, free: Sequence[bool]) -> Iterator[tuple[int, bool]]:
    """The last pieces of the spans that start at a piece, and whether they are run again."""
    yield first, False
    for last in range(first, len(free)):
        if not free[last]:
            return
        yield last, True


def _best(ways: list[Choice]) -> list[Choice]:
    """Those that no other one beats in FLOPs and in what is held."""
    found: list[Choice] = []
    for way in sorted(ways, key=lambda w: (w.flops, w.held, w.peak)):
        if not found or way.held < found[-1].held:
            found.append(way)
    return found


def choices(pieces: Sequence[Piece], table: Table, free: Sequence[bool]) -> Iterator[Choice]:
    """The cheapest choices, from the one that runs nothing again to the one with the lowest peak. Arguments as in `cheapest`."""
    limit = float("inf")
    while (found := cheapest(pieces, table, free, limit)) is not None:
        yield found
        limit = STEP * found.peak


@dataclass(frozen=True)
class Chain:
    """The blocks of a graph as a chain of pieces, measured once; pieces end at blocks that end at cut candidates.

    Attributes:
        ends: numbers of the blocks that end pieces. before: pieces before the first block. table: `peaks` of all pieces.
    """

    blocks: tuple[Region, ...]
    ends: tuple[int, ...]
    before: int
    pieces: tuple[Piece, ...]
    table: Table = field(repr=False)

    @property
    def inside(self) -> range:
        """The pieces that are blocks; what comes after the last block belongs to the last one that is no piece of its own."""
        return range(self.before, self.before + len(self.ends) + (self.ends[-1] != len(self.blocks) - 1))

    def runs(self, choice: Choice) -> Runs:
        """The names of the blocks in each run of a choice."""
        starts = [0, *(end + 1 for end in self.ends)]
        spans = ((starts[first - self.before], self.ends[last - self.before] + 1) for first, last in choice.runs)
        return tuple(tuple(block.name for block in self.blocks[a:b]) for a, b in spans)

    def peak(self, runs: Runs) -> float | None:
        """The predicted peak of activations with these blocks run again, in bytes; None if one of the runs does not end at pieces' ends."""
        number = {self.blocks[end].name: self.before + place for place, end in enumerate(self.ends)}
        starts = {self.blocks[block].name: self.before + place for place, block in enumerate([0, *(end + 1 for end in self.ends[:-1])])}
        if any(run[0] not in starts or run[-1] not in number for run in runs):
            return None
        again = {starts[run[0]]: number[run[-1]] for run in runs}
        first, held, peak = 0, 0.0, 0.0
        while first < len(self.pieces):
            last = again.get(first, first)
            peak = max(peak, held + float(self.table[first, last]))
            held += self.pieces[first].input[1] + (0 if first in again else self.pieces[first].saved)
            first = last + 1
        return peak


def chain_of(graph: Graph) -> Chain | None:
    """The chain of a graph's blocks; None if none of them ends at a cut candidate, or if the graph cannot be run on fake tensors."""
    return graph.cached(_chain_of)


def _chain_of(graph: Graph) -> Chain | None:
    blocks = find_blocks(graph)
    at = {candidate.node: candidate for candidate in cut_candidates(graph)}
    ends = tuple(i for i, block in enumerate(blocks) if len(block.exits) == 1 and block.exits[0] in at)
    start = [node for node in blocks[0].entries if node in at]
    try:
        pieces = measure(graph, [at[node] for node in (*start, *(blocks[i].exits[0] for i in ends))])
    except NeedsValuesError:
        return None
    table = peaks([replace(piece, has_parameters=True) for piece in pieces], 0)
    return Chain(blocks, ends, len(start), tuple(pieces), table) if ends else None


def shares(graph: Graph) -> tuple[tuple[float, Runs], ...]:
    """The cheapest ways to stay below every limit: the predicted peak as a share of the plain one, and the blocks of each run.

    From the one that runs nothing again to the one with the lowest peak.
    """
    return graph.cached(_shares)


def _shares(graph: Graph) -> tuple[tuple[float, Runs], ...]:
    chain = chain_of(graph)
    if chain is None:
        raise PassError("no block ends where the backbone can be cut", fix='Select regions, or use segments = "every block"')
    free = [chain.before <= number < chain.before + len(chain.ends) for number in range(len(chain.pieces))]
    found = list(choices(chain.pieces, chain.table, free))
    return tuple((choice.peak / found[0].peak, chain.runs(choice)) for choice in found)


def within(graph: Graph, share: float) -> Runs:
    """The blocks of each run to run again, so that the predicted peak of activations is at most `share` of that without.

    Raises PassError if no choice is that low; says the lowest share.
    """
    found = shares(graph)
    for reached, runs in found:
        if reached <= share:
            return runs
    lowest = math.ceil(1000 * found[-1][0]) / 1000
    what = f"no choice of blocks has a peak of {share:g} of the plain one: the lowest is {lowest:g}"
    raise PassError(what, fix="Give a larger budget")


def in_segments(graph: Graph, segments: int | Literal["every block"], *, by_memory: bool = True) -> Runs:
    """The blocks in so many segments, to be run again; those of the last segment only where that lowers the predicted peak.

    Args:
        by_memory: the segments with the lowest predicted peak, if enough blocks end at cut points; otherwise as many blocks in each.

    Raises PassError for more segments than blocks.
    """
    names = [block.name for block in find_blocks(graph)]
    count = len(names) if segments == "every block" else segments
    if count > len(names):
        what = f"segments = {count}, but there are {len(names)} blocks to divide"
        raise PassError(what, where="the backbone", fix=f"Use at most {len(names)}")
    chain = chain_of(graph) if by_memory else None
    found = _runs(names, [round(i * len(names) / count) for i in range(count + 1)])
    if chain is not None and count < len(names) and (inside := [chain.pieces[i] for i in chain.inside])[count - 1 :]:
        found = _runs(names, [0, *(chain.ends[end] + 1 for end in best_recomputed(inside, count)[1]), len(names)])
    if chain is None or len(found) == 1:
        return found
    peak, without_last = chain.peak(found), chain.peak(found[:-1])
    return found[:-1] if peak is not None and without_last is not None and without_last <= peak else found


def _runs(names: Sequence[str], edges: Sequence[int]) -> Runs:
    return tuple(tuple(names[a:b]) for a, b in pairwise(edges) if a < b)
