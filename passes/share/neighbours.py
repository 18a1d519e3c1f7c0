"""Whose weights a block mixes: those of its neighbours in execution order.

The rule of the published arithmetic: a block is shared when the blocks right before and right after it hold tensors of its shapes. The
exceptions are few, and each is reported:

- A neighbour that is shared itself (two adjacent blocks both selected), or that the backbone has frozen, is passed over: the nearest
  block of the stage beyond it is the source instead. A selected block that is skipped keeps its weights and can be a source.
- A neighbour of other shapes, or none (first and last block): the block is skipped; `boundary = "nearest"` looks further in the
  stage, `boundary = "one-sided"` also accepts a source on one side alone.

A *stage* is a run of blocks whose outputs have one shape. Sources are chosen on the untouched backbone: a neighbour that a freeze pass
freezes, now or later, stays a source.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from graphopt import Graph, Match, Region
from graphopt.ir.blocks import find_blocks
from graphopt.ir.patterns import attention_path, shape_of
from graphopt.passes.share.options import Boundary, Mode, Part
from graphopt.passes.share.surrogate import NotShareable, check_mixable, inside, is_norm, part_of, surrogate_of


@dataclass(frozen=True)
class MixedTensor:
    """A tensor that is replaced, and the names of those it becomes a mix of: of the block before, of the block after, or both."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class SharedBlock:
    """A region that is computed with mixes of its neighbours' weights. All names, so that it holds for every clone of the graph.

    Attributes:
        region, paths: as in `Region`. before, after: names of the blocks it mixes; one of them may be None.
        part: what of it is replaced. tensors: the same, by name.
    """

    region: str
    paths: tuple[str, ...]
    before: str | None
    after: str | None
    part: Part
    tensors: tuple[MixedTensor, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(s for s in (self.before, self.after) if s is not None)


#: the blocks to share, by region name
Decision = dict[str, SharedBlock]


@dataclass(frozen=True)
class _Candidate:
    """A selected region, the position of its block, what of it would be replaced, and what its neighbours must have in the same shapes."""

    region: Region
    index: int
    part: Part
    tensors: tuple[str, ...]
    compared: tuple[str, ...]


def match_neighbours(
    graph: Graph, selected: Sequence[Region], *, mode: Mode, parts: Part | None, mix_norms: bool, boundary: Boundary
) -> Match[Decision]:
    """Pairs every selected region with its neighbours; those that cannot be shared are skipped with the reason."""
    blocks, match = _BlockSequence(graph), Match[Decision](())
    candidates: list[_Candidate] = []
    for region in selected:
        with _skipped(match, region):
            candidate = _candidate(graph, blocks, region, mode, parts, mix_norms)
            # Which could be shared if no other was: one that is skipped for its own reasons can be a source of others.
            blocks.sources(candidate, boundary, frozenset())
            candidates.append(candidate)
    taken = frozenset((c.index, blocks.relative_name(c.index, n)) for c in candidates for n in c.tensors)
    decision = match.decision = {}
    for candidate in candidates:
        region, index = candidate.region, candidate.index
        with _skipped(match, region):
            before, after = blocks.sources(candidate, boundary, taken)
            decision[region.name] = blocks.shared(candidate, before, after)
            match.regions += (region,)
            if before is None or after is None:
                match.note(region.name, f"one-sided: it uses the weights of the block {'after' if before is None else 'before'} it alone")
            if any(i is not None and abs(i - index) > 1 for i in (before, after)):
                named = " and ".join(decision[region.name].sources)
                match.note(region.name, f"it uses the weights of {named}: the blocks between cannot be its sources")
    order = {r.name: i for i, r in enumerate(selected)}
    match.diagnostics.sort(key=lambda d: order[d.location])
    return match


@contextmanager
def _skipped(match: Match[Decision], region: Region) -> Iterator[None]:
    try:
        yield
    except NotShareable as reason:
        match.skip(region.name, str(reason))


def _candidate(graph: Graph, blocks: "_BlockSequence", region: Region, mode: Mode, parts: Part | None, mix_norms: bool) -> _Candidate:
    index = blocks.index_of(region)
    block = blocks.blocks[index]
    whole = block.paths == region.paths
    if mode == "surrogate":
        if not whole:
            raise NotShareable(f"it is part of the block {block.name}, and a surrogate replaces a whole block")
        surrogate = surrogate_of(graph, block, parts)
        part, norms = surrogate.part, surrogate.norms if mix_norms else ()
        tensors = (*surrogate.weights, *norms)
        compared = (*(n for n in block.parameters if not is_norm(graph, n)), *norms)
    else:
        part = parts or ("attention" if whole and attention_path(graph, block) not in (None, block.name) else "all")
        found = part_of(graph, block, part)
        if not found:
            raise NotShareable(f"it has no {'MLP' if part == 'mlp' else part}")
        tensors = compared = tuple(n for n in found if n in region.parameters and (mix_norms or not is_norm(graph, n)))
        if not tensors:
            besides = "" if mix_norms else ' besides norms (norm = "mix" shares those too)'
            raise NotShareable(f"it has no parameters{besides}")
    if not set(tensors).difference(graph.unused):
        raise NotShareable("no gradient reaches its weights")
    check_mixable(graph, tensors)
    return _Candidate(region, index, part, tensors, compared)


class _BlockSequence:
    """The blocks of a graph in execution order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.blocks = find_blocks(graph)
        self._holder = {node: index for index, block in reversed(tuple(enumerate(self.blocks))) for node in block.nodes}

    def index_of(self, region: Region) -> int:
        """Position of the block that a region is, or is part of."""
        index = self._holder.get(region.nodes[0]) if region.nodes else None
        if index is not None and self.blocks[index].covers(region):
            return index
        if held := sum(region.covers(b) for b in self.blocks):
            raise NotShareable(f"it holds {held} blocks: select them one by one, {{ path = {region.name!r}, blocks = true }}")
        raise NotShareable("it is neither a block nor part of one, so it has no neighbours")

    def relative_name(self, index: int, name: str) -> str:
        """A tensor's name inside its block; in a run of layers, the layer by its position."""
        paths = self.blocks[index].paths
        position = next((i for i, path in enumerate(paths) if name.startswith(f"{path}.")), None)
        relative = inside(name, paths)
        return relative if position is None or len(paths) == 1 else f"{position}.{relative}"

    @cached_property
    def tensors(self) -> tuple[dict[str, str], ...]:
        """Of each block: relative name -> name."""
        return tuple({self.relative_name(i, n): n for n in block.parameters} for i, block in enumerate(self.blocks))

    @cached_property
    def stages(self) -> tuple[int, ...]:
        shapes = [[shape_of(e) for e in block.exits] for block in self.blocks]
        return tuple(accumulate((before != after for before, after in pairwise(shapes)), initial=0))

    def sources(self, candidate: _Candidate, boundary: Boundary, taken: frozenset[tuple[int, str]]) -> tuple[int | None, int | None]:
        """Positions of the blocks before and after a candidate whose weights it will use; raises NotShareable where there are none.

        Args:
            taken: (position, relative name) of the tensors that are replaced themselves.
        """
        (before, no_before), (after, no_after) = (self._nearest(candidate, step, boundary, taken) for step in (-1, 1))
        if before is None and after is None:
            raise NotShareable(f"it has no neighbour whose weights it could use: {no_before}; {no_after}")
        if (before is None or after is None) and boundary != "one-sided":
            options = 'boundary = "one-sided"' if boundary == "nearest" else 'boundary = "nearest" or "one-sided"'
            raise NotShareable(f"{no_before if before is None else no_after} ({options} looks further)")
        return before, after

    def _nearest(self, candidate: _Candidate, step: int, boundary: Boundary, taken: frozenset[tuple[int, str]]) -> tuple[int | None, str]:
        """Position of the nearest source in one direction, or None and the reason why the direct neighbour is none."""
        first = ""
        neighbour = index = candidate.index + step
        while 0 <= index < len(self.blocks) and (index == neighbour or self.stages[index] == self.stages[candidate.index]):
            reason, passed_over = self._unusable(candidate, index, taken)
            if not reason:
                return index, ""
            first = first or reason
            if boundary == "skip" and not passed_over:
                break
            index += step
        return None, first or f"no block comes {'before' if step < 0 else 'after'} it"

    def _unusable(self, candidate: _Candidate, index: int, taken: frozenset[tuple[int, str]]) -> tuple[str, bool]:
        """Why a block cannot be a source ("" where it can), and whether it is then passed over whatever `boundary` says."""
        parameter, theirs, name = self.graph.module.get_parameter, self.tensors[index], self.blocks[index].name
        for own in candidate.compared:
            relative = self.relative_name(candidate.index, own)
            if relative not in theirs:
                return f"its neighbour {name} has no {relative}", False
            here, there = parameter(own).shape, parameter(theirs[relative]).shape
            if here != there:
                return f"its neighbour {name} has other shapes ({relative} is {_text(there)}, not {_text(here)})", False
        relatives = [self.relative_name(candidate.index, own) for own in candidate.tensors]
        if any((index, r) in taken for r in relatives):
            return f"its neighbour {name} is shared itself", True
        if not any(parameter(theirs[r]).requires_grad for r in relatives):
            return f"its neighbour {name} is frozen", True
        return "", True

    def shared(self, candidate: _Candidate, before: int | None, after: int | None) -> SharedBlock:
        """A candidate with its sources, by name."""
        region, sources = candidate.region, [self.tensors[i] for i in (before, after) if i is not None]
        relative = {own: self.relative_name(candidate.index, own) for own in candidate.tensors}
        tensors = tuple(MixedTensor(own, tuple(theirs[name] for theirs in sources)) for own, name in relative.items())
        first, last = (None if i is None else self.blocks[i].name for i in (before, after))
        return SharedBlock(region.name, region.paths, first, last, candidate.part, tensors)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
