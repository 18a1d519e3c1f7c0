"""Which parts of a graph run again in the backward: so that activations stay within a share of their peak, or in segments.

What runs again saves its inputs only. With a share, runs of whole blocks and spans of operations inside blocks are chosen together
(`graphopt.cost.spans`). Choices for all shares are found from the highest peak down, each below the one
before. A smaller share therefore never has the higher predicted peak.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

from graphopt.cost.partition import Piece, Table, best_recomputed, measure, peaks
from graphopt.cost.retention import Retention, retention
from graphopt.cost.spans import Span, Spans
from graphopt.errors import NeedsValuesError, PassError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.ir.regions import Region


class Run(NamedTuple):
    """What runs again together: names of blocks, with what lies between them; or only some `nodes` of them, by name."""

    blocks: tuple[str, ...]
    nodes: tuple[str, ...] = ()


Runs = tuple[Run, ...]


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

    def peak(self, runs: Runs) -> float | None:
        """The predicted peak of activations with these blocks run again, in bytes; None if one of the runs does not end at pieces' ends."""
        number = {self.blocks[end].name: self.before + place for place, end in enumerate(self.ends)}
        starts = {self.blocks[block].name: self.before + place for place, block in enumerate([0, *(end + 1 for end in self.ends[:-1])])}
        if any(run.blocks[0] not in starts or run.blocks[-1] not in number for run in runs):
            return None
        again = {starts[run.blocks[0]]: number[run.blocks[-1]] for run in runs}
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
    """The cheapest ways to stay below every limit: the predicted peak as a share of the plain one, and what runs again.

    From the one that runs nothing again to the one with the lowest peak.
    """
    return graph.cached(_shares)


def _shares(graph: Graph) -> tuple[tuple[float, Runs], ...]:
    blocks, at = find_blocks(graph), {candidate.node for candidate in cut_candidates(graph)}
    ends = [number for number, block in enumerate(blocks) if len(block.exits) == 1 and block.exits[0] in at]
    if not ends:
        raise PassError("no block ends where the backbone can be cut", fix='Select regions, or use segments = "every block"')
    measured = retention(graph)
    edges = [measured.position[blocks[0].nodes[0]], *(measured.position[blocks[end].exits[0]] + 1 for end in ends)]
    every = [0, *edges, len(measured.operations)]
    segments = tuple((a, b - 1) for a, b in pairwise(every))
    free = (False, *(True for _ in ends), False)
    kept = [number for number, (first, last) in enumerate(segments) if first <= last]
    spans = Spans(measured, tuple(segments[k] for k in kept), tuple(free[k] for k in kept))
    name = partial(_named, measured, blocks, set(edges))
    found = list(spans.choices())
    return tuple((choice.peak / found[0].peak, tuple(map(name, choice.spans))) for choice in found)


def _named(measured: Retention, blocks: Sequence[Region], edges: set[int], span: Span) -> Run:
    """The names of what is in a span; of its nodes, where it is not made of whole segments."""
    first, last = span
    nodes = [operation.node for operation in measured.operations[first : last + 1]]
    inside = tuple(block.name for block in blocks if not set(nodes).isdisjoint(block.nodes))
    if not inside:  # it lies between blocks, and belongs to the one that comes next
        inside = tuple(block.name for block in blocks if measured.position[block.nodes[0]] > last)[:1]
    return Run(inside, () if {first, last + 1} <= edges else tuple(node.name for node in nodes))


def within(graph: Graph, share: float) -> Runs:
    """What to run again, so that the predicted peak of activations is at most `share` of that without.

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
    return tuple(Run(tuple(names[a:b])) for a, b in pairwise(edges) if a < b)
