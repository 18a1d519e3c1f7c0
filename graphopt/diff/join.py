"""Two sides joined into one diff: row by row, on the backbone's own paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.diff.rows import Row, Side, plain
from graphopt.diff.status import ranked

FORMAT = "graphopt.diff/1"


@dataclass(frozen=True)
class Fold:
    """Equal neighbours shown as one: `layer3.2-5 x4`."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Diff:
    """What became of one graph in another.

    Attributes:
        before, after: the two sides. rows: of both, in execution order; costs of a row are its `before` and `after`.
        edges: (from, to, "both" | "before" | "after"). same_backbone: whether rows of one name are one and the same.
    """

    before: Side
    after: Side
    rows: tuple[Row, ...]
    edges: tuple[tuple[str, str, str], ...]
    same_backbone: bool
    notes: tuple[str, ...] = field(default=())

    def folded(self) -> tuple[Fold, ...]:
        """The rows with equal neighbours as one."""
        found: list[list[Row]] = []
        for row in self.rows:
            if found and found[-1][-1].alike() == row.alike() and not row.beside and self._linked(found[-1][-1], row):
                found[-1].append(row)
            else:
                found.append([row])
        return tuple(Fold(fold_name([r.name for r in rows]), tuple(rows)) for rows in found)

    def _linked(self, one: Row, other: Row) -> bool:
        """No neighbour of a gradient's end is folded away, and nothing is read from the midst of a fold."""
        return not any((a, b) == (one.name, other.name) for a, b in (*self.after.frontier, *self.before.frontier))

    def counts(self) -> dict[str, int]:
        """How many rows have each main status, weightiest first."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.status] = found.get(row.status, 0) + 1
        return {s: found[s] for s in ranked(tuple(found)) if s in found} | ({"kept": found["kept"]} if "kept" in found else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same input gives the same bytes."""
        return {
            "format": FORMAT,
            "before": _side(self.before),
            "after": _side(self.after),
            "same_backbone": self.same_backbone,
            "notes": list(self.notes),
            "counts": self.counts(),
            "folds": [{"name": f.name, "rows": [r.name for r in f.rows]} for f in self.folded()],
            "rows": [{**plain(r), "status": r.status, "changed": r.changed} for r in self.rows],
            "edges": [list(e) for e in self.edges],
            "frontier": plain(self.after.frontier),
            "bands": plain(self.after.bands),
            "passes": plain(self.after.passes),
            "tap": self.after.tap,
        }


def join(before: Side, after: Side) -> Diff:
    """The diff of two sides, whether of one backbone or of two.

    Of one backbone, a row keeps its statuses on both sides (`was`, `statuses`), each against the backbone itself. Of two, a row is
    kept where name, class, operators and sizes agree, "differs" where only the name does, "removed" or "added" where it is on one side.
    """
    same = before.backbone == after.backbone
    mine, theirs = {r.name: r for r in before.rows}, {r.name: r for r in after.rows}
    rows = []
    for name in _merged([r.name for r in before.rows], [r.name for r in after.rows]):
        one, other = mine.get(name), theirs.get(name)
        if one is not None and other is not None:
            # Against the bare backbone every row keeps what the plan says of it; `was` is then "kept".
            statuses = other.statuses if same or _same(one, other) else ranked({*other.statuses, "differs"})
            rows.append(replace(other, was=one.statuses, statuses=statuses, before=_own(one), after=_own(other)))
        elif other is not None:
            statuses = other.statuses if same else ranked({*other.statuses, "added"})
            rows.append(replace(other, was=(), statuses=statuses, before=None, after=_own(other)))
        else:
            assert one is not None
            rows.append(replace(one, was=one.statuses, statuses=("removed",), passes=(), before=_own(one), after=None, backward=False))
    both = dict.fromkeys(before.edges, "both") | {e: "both" if e in before.edges else "after" for e in after.edges}
    kept = set(after.edges)
    edges = tuple((a, b, kind if (a, b) in kept else "before") for (a, b), kind in both.items())
    notes = []
    if not same:
        shared = sum(1 for r in rows if r.name in mine and r.name in theirs and "differs" not in r.statuses)
        notes.append(
            f"two backbones, {before.backbone} and {after.backbone}: {shared} rows are the same in both, "
            f"{sum('differs' in r.statuses for r in rows)} differ under one name, "
            f"{sum(n not in theirs for n in mine)} are only in the first, {sum(n not in mine for n in theirs)} only in the second"
        )
    return Diff(before, after, tuple(rows), edges, same, tuple(notes))


def _own(row: Row) -> Mapping[str, int] | None:
    return row.after if row.after is not None else row.before


def _same(one: Row, other: Row) -> bool:
    def inside(row: Row) -> list[Any]:
        return [(n.op, n.what, n.parameters) for n in row.nodes if n.by is None]

    return one.kind == other.kind and one.entering == other.entering and one.leaving == other.leaving and inside(one) == inside(other)


def _merged(mine: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Names of both in one order: theirs, with what only the first has at its place among what both have."""
    here, there = set(mine), set(theirs)
    found: list[str] = []
    position = 0
    for name in theirs:
        if name in here:
            while position < len(mine) and mine[position] not in there:
                found.append(mine[position])
                position += 1
            position = max(position, mine.index(name) + 1)
        found.append(name)
    done = set(found)
    return found + [n for n in mine if n not in done]


def fold_name(names: Sequence[str]) -> str:
    """`layer3.2-5 x4` for layer3.2, layer3.3, layer3.4 and layer3.5."""
    if len(names) == 1:
        return names[0]
    parents = {n.rpartition(".")[0] for n in names}
    first, last = names[0].rpartition(".")[2], names[-1].rpartition(".")[2]
    if len(parents) == 1:
        parent = parents.pop()
        end = last.rpartition("-")[2]
        start = first.partition("-")[0]
        if not (start.isdigit() and end.isdigit()):
            start, end = first, last
        return f"{f'{parent}.' if parent else ''}{start}-{end} ×{len(names)}"
    return f"{names[0]} … {names[-1]} ×{len(names)}"


def _side(side: Side) -> dict[str, Any]:
    return {
        "title": side.title,
        "backbone": side.backbone,
        "digest": side.digest,
        "batch": side.batch,
        "spec": side.spec,
        "epoch": side.epoch,
        "totals": plain(side.totals),
    }
