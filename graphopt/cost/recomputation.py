"""Which blocks to run again so that a step's activations stay within a share of their peak, at the fewest FLOPs.

The blocks are a chain. Each is kept (its activations are saved), or is part of a run of blocks that saves its input only and is run again
in the backward. When the backward reaches a run, what is held is: of every kept block before it, what it saves; of every run before it, its
input; and the run's own activations. So the peak of any choice follows by addition from one measurement of the blocks, and a dynamic
programme over the chain finds the cheapest one below a limit, exactly for the prediction.

Choices for all limits are found from the highest down, each limit just below the peak of the choice before. A smaller share therefore
never has the higher predicted peak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from graphopt.cost.partition import Piece, Table, measure, peaks
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.partition import cut_candidates
from graphopt.ir.regions import Region

#: each limit is lower than the peak before it by this factor: peaks that are closer are taken as one
STEP = 0.995


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


def choices(pieces: Sequence[Piece], free: Sequence[bool]) -> Iterator[Choice]:
    """The cheapest choices, from the one that runs nothing again to the one with the lowest peak."""
    table = peaks([replace(piece, has_parameters=True) for piece in pieces], 0)
    limit = float("inf")
    while (found := cheapest(pieces, table, free, limit)) is not None:
        yield found
        limit = STEP * found.peak


def recomputed_within(graph: Graph, blocks: Sequence[Region], share: float) -> tuple[tuple[str, ...], ...]:
    """Names of the blocks of each run to run again, so that the predicted peak of activations is at most `share` of that without.

    Runs end at blocks that end at cut candidates; what lies before the first block and after the last is kept.

    Raises PassError if no choice is that low; says the lowest share.
    """
    at = {candidate.node: candidate for candidate in cut_candidates(graph)}
    ends = [i for i, block in enumerate(blocks) if len(block.exits) == 1 and block.exits[0] in at]
    start = [node for node in blocks[0].entries if node in at]
    pieces = measure(graph, [at[node] for node in (*start, *(blocks[i].exits[0] for i in ends))])
    before = len(start)
    free = [before <= number < before + len(ends) for number in range(len(pieces))]
    peak = lowest = 0.0
    for choice in choices(pieces, free):
        peak = peak or choice.peak
        lowest = choice.peak / peak
        if lowest <= share:
            starts = [0, *(end + 1 for end in ends)]
            spans = ((starts[first - before], ends[last - before]) for first, last in choice.runs)
            return tuple(tuple(block.name for block in blocks[a : b + 1]) for a, b in spans)
    raise PassError(f"no choice of blocks has a peak of {share:g} of the plain one: the lowest is {lowest:.2f}", fix="Give a larger budget")
