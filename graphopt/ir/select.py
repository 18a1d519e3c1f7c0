"""Selectors: the part of a spec that names regions.

A string is a glob on module paths (`*` one segment or part of one, `**` any number of segments, none included); `re:` makes it a regular
expression for the whole path; a list is a union; a table starts from paths, types or blocks and filters. Regions come in execution
order, each once, and none inside another. What matches nothing is an error that shows the nearest paths.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graphopt.errors import SelectError, did_you_mean, listed
from graphopt.ir.blocks import find_blocks
from graphopt.ir.paths import containers
from graphopt.ir.regions import Region, region_of
from graphopt.ir.selector import Filter, Selector

if TYPE_CHECKING:
    from graphopt.ir.graph import Graph


def select(selector: Selector, graph: Graph) -> tuple[Region, ...]:
    """The regions a selector names in a graph, in execution order, none inside another.

    Raises SelectError if an entry matches nothing; says which, with the nearest paths.
    """
    return _outermost(graph, _select(selector, graph))


def _select(selector: Any, graph: Graph) -> list[Region]:
    if isinstance(selector, str):
        return _by_path(selector, graph)
    if isinstance(selector, Filter):
        return _by_table(selector, graph)
    return [region for entry in dict.fromkeys(selector) for region in _select(entry, graph)]


def _by_path(pattern: str, graph: Graph) -> list[Region]:
    matches = compile_pattern(pattern)
    aliased = {path for alias, path in graph.aliases.items() if matches(alias)}
    paths = [p for p in graph.paths if matches(p) or p in aliased]
    if pattern == "**":
        paths = [""]
    if paths:
        inside: set[str] = set(paths)
        # What lies inside a matched path adds nothing: only the outermost become regions.
        paths = [p for p in paths if not any(p.startswith(f"{q}.") for q in containers(p) if q in inside)]
        return [region_of(graph, (p,)) for p in paths]
    if named := [b for b in find_blocks(graph) if b.name == pattern]:
        return named
    fix = did_you_mean(_plain(pattern), graph.paths) or f"Its first paths are {', '.join(graph.paths[:5])}"
    raise SelectError(f"{pattern!r} matches no path of the graph", fix=fix)


def _by_table(table: Filter, graph: Graph) -> list[Region]:
    steps: list[str] = []

    def narrowed(regions: list[Region], step: str, before: list[Region]) -> list[Region]:
        steps.append(step)
        if not regions:
            had = listed((r.name for r in before), 5) or "nothing"
            raise SelectError(f"the selector is empty after {' and '.join(steps)}", fix=f"Before that step it held: {had}")
        return regions

    regions = _start(table, graph, steps)
    order = graph.order
    after, before = table.between or (table.after, table.before)
    if after is not None:
        edge = max(order[n] for n in _one(after, graph).nodes)
        regions = narrowed([r for r in regions if min(order[n] for n in r.nodes) > edge], f"after = {after!r}", regions)
    if before is not None:
        edge = min(order[n] for n in _one(before, graph).nodes)
        regions = narrowed([r for r in regions if max(order[n] for n in r.nodes) < edge], f"before = {before!r}", regions)
    if table.exclude is not None:
        out = _select(table.exclude, graph)
        left = [r for r in regions if not any(o.covers(r) or r.covers(o) for o in out)]
        regions = narrowed(left, f"exclude = {table.exclude!r}", regions)
    regions = list(_outermost(graph, regions))
    if table.first is not None:
        regions = narrowed(regions[: _count(table.first, len(regions))], f"first = {table.first}", regions)
    if table.last is not None:
        count = _count(table.last, len(regions))
        regions = narrowed(regions[len(regions) - count :], f"last = {table.last}", regions)
    if table.every is not None:
        offset = table.every - 1 if table.offset is None else table.offset
        step = f"every = {table.every}" + ("" if table.offset is None else f", offset = {table.offset}")
        regions = narrowed(regions[offset :: table.every], step, regions)
    return regions


def _start(table: Filter, graph: Graph, steps: list[str]) -> list[Region]:
    globs = None if table.path is None else tuple(dict.fromkeys((table.path,) if isinstance(table.path, str) else table.path))
    if table.blocks:
        regions = list(find_blocks(graph))
        steps.append("blocks = true")
        if not regions:
            raise SelectError("the backbone has no repeated blocks", fix="Select by path or type instead")
        if globs is not None:
            within = [r for g in globs for r in _by_path(g, graph)]
            regions = [b for b in regions if any(r.covers(b) for r in within)]
            steps.append(f"path = {table.path!r}")
            if not regions:
                fix = f"The blocks are {listed((b.name for b in find_blocks(graph)), 6)}"
                raise SelectError(f"no block lies at or below {table.path!r}", fix=fix)
        if table.type is not None:
            regions = _of_type(table.type, regions)
        return regions
    if globs is not None:
        if table.type is None:
            return [r for g in globs for r in _by_path(g, graph)]
        # With a type, every matched path counts, not only the outermost: `path = "layer1.**", type = "Conv2d"`.
        found = []
        for glob in globs:
            matches = compile_pattern(glob)
            paths = [p for p in graph.paths if matches(p)]
            if not paths:
                _by_path(glob, graph)
            found += [region_of(graph, (p,)) for p in paths if p in graph.types]
        return _of_type(table.type, found)
    return _of_type(table.type or "*", [region_of(graph, (p,)) for p in graph.paths if p in graph.types])


def _of_type(types: str | tuple[str, ...], regions: list[Region]) -> list[Region]:
    patterns = (types,) if isinstance(types, str) else dict.fromkeys(types)
    kinds = {r.kind for r in regions}
    chosen: list[Region] = []
    for pattern in patterns:
        matches = compile_pattern(pattern)
        hits = [r for r in regions if matches(r.kind)]
        if not hits:
            fix = did_you_mean(_plain(pattern), kinds) or f"There are {', '.join(sorted(kinds)[:8])}"
            raise SelectError(f"type = {pattern!r} matches no module", fix=fix)
        chosen += hits
    return chosen


def _one(pattern: str, graph: Graph) -> Region:
    regions = _outermost(graph, _by_path(pattern, graph))
    return regions[0] if len(regions) == 1 else region_of(graph, tuple(p for r in regions for p in r.paths))


def _outermost(graph: Graph, regions: Iterable[Region]) -> tuple[Region, ...]:
    order = graph.order
    largest_first = sorted({r.name: r for r in regions}.values(), key=lambda r: -len(r.nodes))
    owner: set[Any] = set()
    kept = []
    for region in largest_first:
        if not set(region.nodes) <= owner:
            kept.append(region)
            owner |= set(region.nodes)
    return tuple(sorted(kept, key=lambda r: order[r.nodes[0]]))


def _count(share: int | float, total: int) -> int:
    return min(share, total) if isinstance(share, int) else round(share * total)


def _plain(pattern: str) -> str:
    return pattern.removeprefix("re:").replace("**", "").replace("*", "").strip(".") or pattern


def _nesting(parsed: Any) -> int:
    """How deep repetitions and alternatives are nested in a parsed regular expression, from the outermost repetition on."""
    deepest = 0
    for operation, argument in parsed:
        parts = argument if isinstance(argument, (tuple, list)) else ()
        inner = [part for part in itertools.chain(parts, *(p for p in parts if isinstance(p, list))) if hasattr(part, "data")]
        repeats = "REPEAT" in str(operation) and argument[1] > 1
        deepest = max(deepest, max(map(_nesting, inner), default=0) + repeats, str(operation) == "BRANCH")
    return deepest


@lru_cache(maxsize=512)
def compile_pattern(pattern: str) -> Any:
    """A predicate on whole paths. Raises SelectError if the text after `re:` is no regular expression."""
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise SelectError(f"{pattern!r} is no regular expression: {error}") from None
        if _nesting(re._parser.parse(pattern[3:])) > 1:  # type: ignore[attr-defined]  # typeshed has no parser of re
            what = f"{pattern!r} repeats what has repetitions or alternatives in it, which can take for ever"
            raise SelectError(what, fix="Use one repetition, or a list of selectors")
        return compiled.fullmatch
    parts = []
    # Neighbouring stars say no more than one of them, but could be matched in very many ways.
    segments = [s if s == "**" else re.sub(r"\*+", "*", s) for s in pattern.split(".")]
    segments = [s for i, s in enumerate(segments) if not (s == "**" and segments[i + 1 : i + 2] == ["**"])]
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            # `a.**` also means `a` itself: any number of segments, none included.
            parts.append(r"(?:[^.]+(?:\.|$))*" if not last else r"(?:[^.]+(?:\.[^.]+)*)?")
        else:
            parts.append("".join("[^.]*" if c == "*" else "[^.]" if c == "?" else re.escape(c) for c in segment))
            if not last:
                parts.append(r"\." if segments[i + 1 :] != ["**"] else r"(?:\.|$)")
    return re.compile("".join(parts)).fullmatch
