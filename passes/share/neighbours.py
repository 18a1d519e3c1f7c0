"""Whose weights a block lives on: its neighbours in execution order.

The rule of the published arithmetic: a block is replaced when the blocks right before and right after it hold tensors of its shapes. The
exceptions are few, and each is told in a note:

- A neighbour that is shared itself (two adjacent blocks both selected), or that the backbone brings frozen, is passed over: the nearest
  block of the stage beyond it stands in. A selected block that is skipped keeps its weights and can be a source.
- A neighbour of other shapes, or none (first and last block): the block is skipped; `boundary = "nearest"` looks further in the
  stage, `boundary = "one-sided"` also takes what there is on one side alone.

A *stage* is a run of blocks whose outputs have one shape. Choices are made once, on the untouched backbone: a neighbour that a freeze
pass freezes, now or later, stays the source that it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from graphopt.compiler.pass_base import Note
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Graph
from graphopt.ir.regions import Region
from graphopt.passes.share.parts import Unfit, attention_path, demand_mixable, is_norm, part_of
from graphopt.passes.share.surrogate import surrogate_of

Boundary = Literal["skip", "nearest", "one-sided"]
Mode = Literal["mix", "surrogate"]
Parts = Literal["attention", "mlp", "all"]


@dataclass(frozen=True)
class Blend:
    """One tensor that is replaced: its name, and the names of those it becomes a mix of (None: nothing on that side)."""

    own: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Sharing:
    """One region that gives its weights up. All names, so that it holds for every clone of the graph.

    Attributes:
        region, paths: as in `Region`. before, after: names of the blocks it lives on.
        part: what of it is replaced. blends: its tensors.
    """

    region: str
    paths: tuple[str, ...]
    before: str | None
    after: str | None
    part: Parts
    blends: tuple[Blend, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for s in (self.before, self.after) if s is not None))


@dataclass(frozen=True)
class Found:
    """What a selection comes to: the regions that share, and a reason for each that does not."""

    shared: tuple[Sharing, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class _Candidate:
    region: Region
    host: int
    part: Parts
    tensors: tuple[str, ...]  # own names of what is replaced
    compared: tuple[str, ...]  # own names of what neighbours must match


def find(graph: Graph, selected: Iterable[Region], *, mode: Mode, parts: Parts | None, mix_norms: bool, boundary: Boundary) -> Found:
    """Pairs every selected region with its neighbours. Changes nothing; `graph` is the untouched one."""
    street = _Street(graph)
    notes: list[Note] = []
    candidates: list[_Candidate] = []
    for region in selected:
        try:
            candidates.append(_candidate(graph, street, region, mode, parts, mix_norms))
        except Unfit as reason:
            notes.append(Note("skip", region.name, str(reason)))
    # First who could share if nobody else did, then who does: one that is skipped for its own reasons can serve others.
    fit: list[_Candidate] = []
    for candidate in candidates:
        try:
            street.sources(candidate, boundary, frozenset())
            fit.append(candidate)
        except Unfit as reason:
            notes.append(Note("skip", candidate.region.name, str(reason)))
    taken = frozenset((c.host, street.relative(c.host, n)) for c in fit for n in c.tensors)
    shared = []
    for candidate in fit:
        try:
            before, after = street.sources(candidate, boundary, taken)
        except Unfit as reason:
            notes.append(Note("skip", candidate.region.name, str(reason)))
            continue
        shared.append(street.sharing(candidate, before, after))
        if after is None or before is None:
            side = "after" if before is None else "before"
            notes.append(Note("info", candidate.region.name, f"one-sided: it lives on the block {side} it alone"))
        if any(i is not None and abs(i - candidate.host) > 1 for i in (before, after)):
            named = " and ".join(street.blocks[i].name for i in (before, after) if i is not None)
            notes.append(Note("info", candidate.region.name, f"it lives on {named}: what lies between cannot be its source"))
    order = {r.name: i for i, r in enumerate(selected)}
    return Found(tuple(shared), tuple(sorted(notes, key=lambda n: order.get(n.where, 0))))


def _candidate(graph: Graph, street: _Street, region: Region, mode: Mode, parts: Parts | None, mix_norms: bool) -> _Candidate:
    host = street.host(region)
    block = street.blocks[host]
    whole = block.paths == region.paths
    attends = attention_path(graph, block)
    if mode == "surrogate":
        if not whole:
            raise Unfit(f"it is part of the block {block.name}: a surrogate stands for a whole block")
        operator = surrogate_of(graph, block, parts)
        norms = tuple(n for n in operator.norms if mix_norms)
        weights = tuple(n for n in block.parameters if not is_norm(graph, n))
        demand_mixable(graph, {*operator.kept, *norms})
        return _Candidate(region, host, operator.part, (*operator.kept, *norms), (*weights, *norms))
    part: Parts = parts or ("attention" if whole and attends not in (None, block.name) else "all")
    names = part_of(graph, block, part)
    if not names:
        raise Unfit(f"it has no {'MLP' if part == 'mlp' else part}")
    names = tuple(n for n in names if n in region.parameters and (mix_norms or not is_norm(graph, n)))
    if not names:
        raise Unfit("it has nothing to give up but norms, which stay its own" if not mix_norms else "it has no parameters")
    demand_mixable(graph, set(names))
    return _Candidate(region, host, part, names, names)


class _Street:
    """The blocks of one graph, side by side."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.blocks = find_blocks(graph)

    def host(self, region: Region) -> int:
        for index, block in enumerate(self.blocks):
            if block.covers(region):
                return index
        held = [b.name for b in self.blocks if region.covers(b)]
        if held:
            raise Unfit(f"it holds {len(held)} blocks: select them one by one, {{ path = {region.name!r}, blocks = true }}")
        raise Unfit("it is neither a block nor part of one, so it has no neighbours")

    def relative(self, index: int, name: str) -> str:
        """A tensor's name inside its block; in a run of layers, the layer by its position."""
        paths = self.blocks[index].paths
        for position, path in enumerate(paths):
            if name.startswith(f"{path}."):
                inside = name[len(path) + 1 :]
                return inside if len(paths) == 1 else f"{position}.{inside}"
        return name

    @cached_property
    def tensors(self) -> tuple[dict[str, str], ...]:
        """Of each block: relative name -> name."""
        return tuple({self.relative(i, n): n for n in block.parameters} for i, block in enumerate(self.blocks))

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Number of each block's stage."""
        numbers: list[int] = []
        last = None
        for block in self.blocks:
            shapes = [tuple(getattr(e.meta["val"], "shape", ())) for e in block.exits]
            numbers.append((numbers[-1] if numbers else 0) + (shapes != last))
            last = shapes
        return tuple(numbers)

    @cached_property
    def tied(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for name, parameter in self.graph.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {key: found for key, found in names.items() if len(found) > 1}

    def sources(self, candidate: _Candidate, boundary: Boundary, taken: frozenset[tuple[int, str]]) -> tuple[int | None, int | None]:
        """Indices of the blocks before and after that a candidate will live on.

        Raises:
            Unfit: with the reason, where there are none.
        """
        for name in candidate.tensors:
            same = self.tied.get(id(self.graph.module.get_parameter(name)))
            if same:
                raise Unfit(f"{name} is one tensor with {next(n for n in same if n != name)}")
        found: list[int | None] = []
        reasons = []
        for step in (-1, 1):
            index, reason = self._nearest(candidate, step, boundary, taken)
            found.append(index)
            reasons.append(reason)
        before, after = found
        if before is None and after is None:
            raise Unfit(f"it has no neighbour to live on: {reasons[0]}; {reasons[1]}")
        if (before is None or after is None) and boundary != "one-sided":
            way = 'boundary = "one-sided"' if boundary == "nearest" else 'boundary = "nearest" or "one-sided"'
            raise Unfit(f"{reasons[0] if before is None else reasons[1]} ({way} looks further)")
        return before, after

    def _nearest(self, candidate: _Candidate, step: int, boundary: Boundary, taken: frozenset[tuple[int, str]]) -> tuple[int | None, str]:
        side = "before" if step < 0 else "after"
        first = ""
        index = candidate.host + step
        while 0 <= index < len(self.blocks):
            near = index == candidate.host + step
            if not near and self.stages[index] != self.stages[candidate.host]:
                break
            reason, passable = self._unusable(candidate, index, taken)
            if not reason:
                return index, ""
            first = first or reason
            if boundary == "skip" and not passable:
                break
            index += step
        return None, first or f"no block comes {side} it"

    def _unusable(self, candidate: _Candidate, index: int, taken: frozenset[tuple[int, str]]) -> tuple[str, bool]:
        """Why a block cannot be a source ("" where it can), and whether the search goes on past it in any case."""
        theirs, name = self.tensors[index], self.blocks[index].name
        for own in candidate.compared:
            relative = self.relative(candidate.host, own)
            mine = tuple(self.graph.module.get_parameter(own).shape)
            if relative not in theirs:
                return f"its neighbour {name} has no {relative}", False
            other = tuple(self.graph.module.get_parameter(theirs[relative]).shape)
            if other != mine:
                return f"its neighbour {name} has other shapes ({relative} is {_shape(other)}, not {_shape(mine)})", False
        relatives = [self.relative(candidate.host, own) for own in candidate.tensors]
        if any((index, r) in taken for r in relatives):
            return f"its neighbour {name} is shared itself", True
        if not any(self.graph.module.get_parameter(theirs[r]).requires_grad for r in relatives):
            return f"its neighbour {name} is frozen", True
        return "", True

    def sharing(self, candidate: _Candidate, before: int | None, after: int | None) -> Sharing:
        def named(index: int | None, own: str) -> str | None:
            return None if index is None else self.tensors[index][self.relative(candidate.host, own)]

        blends = tuple(Blend(own, named(before, own), named(after, own)) for own in candidate.tensors)
        names = [None if i is None else self.blocks[i].name for i in (before, after)]
        return Sharing(candidate.region.name, candidate.region.paths, names[0], names[1], candidate.part, blends)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
