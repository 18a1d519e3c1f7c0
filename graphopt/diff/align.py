"""Two views aligned row by row, on the backbone's own paths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.compiler.plan import Plan
from graphopt.diff.match import operations, renamed, same_backbone, what_differs
from graphopt.diff.model import ADDED, DIFFERS, REMOVED, UNCHANGED, ModelView, Row, as_json, ranked
from graphopt.diff.view import backbone_view, plan_view

FORMAT = "graphopt.diff/4"


@dataclass(frozen=True)
class RowGroup:
    """Equal neighbours shown as one: `layer3.2-5 ×4`."""

    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """What it is called."""
        return group_name([r.name for r in self.rows])


@dataclass(frozen=True, repr=False)
class Diff:
    """How one model differs from another.

    Attributes:
        before, after: the two models. rows: of both, in execution order; costs of a row are its `before` and `after`.
        edges: (from, to, "both" | "before" | "after"). same_backbone: whether rows of one name are one and the same.
    """

    before: ModelView
    after: ModelView
    rows: tuple[Row, ...]
    edges: tuple[tuple[str, str, str], ...]
    same_backbone: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, before: Plan, after: Plan | None = None) -> "Diff":
        """What a plan does to its backbone; or, with two plans, how the second differs from the first.

        The plans may be of one backbone (two specs, two phases) or of two: a plan without passes is the backbone itself. Costs appear where
        the plans were compiled with costs.
        """
        return align(backbone_view(before), plan_view(before)) if after is None else align(plan_view(before), plan_view(after))

    def __repr__(self) -> str:
        return f"Diff({self.before.title!r}, {self.after.title!r}, {self.counts()})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture."""
        from graphopt import picture

        return picture(self)

    def groups(self) -> tuple[RowGroup, ...]:
        """The rows with equal neighbours as one. Two rows stay apart where the gradient stops between them."""
        stops = {*self.after.gradient_stops, *self.before.gradient_stops}
        found: list[list[Row]] = []
        for row in self.rows:
            last = found[-1][-1] if found else None
            if last and last.group_key() == row.group_key() and not row.attached_to and (last.name, row.name) not in stops:
                found[-1].append(row)
            else:
                found.append([row])
        return tuple(RowGroup(tuple(rows)) for rows in found)

    def counts(self) -> dict[str, int]:
        """How many rows have each main status, most important first, "unchanged" last."""
        found = Counter(row.status for row in self.rows)
        return {s: found[s] for s in (*ranked(found), UNCHANGED) if found[s]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same input gives the same bytes."""
        head = {"format": FORMAT, "before": _heading(self.before), "after": _heading(self.after), "same_backbone": self.same_backbone}
        groups = [{"name": g.name, "rows": [r.name for r in g.rows]} for g in self.groups()]
        rows = [{**as_json(r), "status": r.status, "changed": r.changed} for r in self.rows]
        return {**head, "notes": list(self.notes), "groups": groups, "rows": rows, **self.flow()}

    def flow(self) -> dict[str, Any]:
        """What connects the rows, JSON-ready, with the passes and the numbers of statuses."""
        names = ("gradient_stops", "sections", "passes", "feature_input")
        return {"counts": self.counts(), "edges": as_json(self.edges), **{name: as_json(getattr(self.after, name)) for name in names}}


def align(before: ModelView, after: ModelView) -> Diff:
    """The diff of two models, whether of one backbone or of two.

    Of one backbone, a row has its statuses in both views (`was`, `statuses`), each against the backbone itself. Of two, rows are matched by
    structure (`graphopt.diff.match`): a row is unchanged where operators and sizes agree, "differs" where its match is like it, "removed"
    or "added" if it has none.
    """
    same = same_backbone(before, after)
    before = before if same else renamed(before, after)
    old, new = {r.name: r for r in before.rows}, {r.name: r for r in after.rows}
    rows = tuple(_aligned(old.get(name), new.get(name), same) for name in _merged(list(old), list(new)))
    kinds = {e: "both" if e in after.edges else "before" for e in before.edges} | {e: "after" for e in after.edges if e not in before.edges}
    edges = tuple((a, b, kind) for (a, b), kind in kinds.items())
    return Diff(before, after, rows, edges, same, () if same else (_note(before, after, rows),))


def _aligned(old: Row | None, new: Row | None, same_backbone: bool) -> Row:
    if new is None:
        assert old is not None
        nodes = tuple(replace(n, changed_by=None) for n in old.nodes)
        return replace(old, was=old.statuses, statuses=(REMOVED,), passes=(), nodes=nodes, before=old.after, after=None, backward=False)
    if old is None:
        return replace(new, was=(), statuses=new.statuses if same_backbone else ranked({*new.statuses, ADDED}), before=None)
    if same_backbone or old.structure == new.structure:
        return replace(new, was=old.statuses, before=old.after, former=old.former)
    statuses, detail = ranked({*new.statuses, DIFFERS}), what_differs(old, new) | dict(new.detail)
    return replace(new, was=old.statuses, statuses=statuses, detail=detail, nodes=operations(old, new), before=old.after, former=old.former)


def _note(before: ModelView, after: ModelView, rows: Sequence[Row]) -> str:
    found = Counter(next((s for s in (REMOVED, ADDED, DIFFERS) if s in row.statuses), UNCHANGED) for row in rows)
    moved = sum(bool(row.former) and REMOVED not in row.statuses for row in rows)
    counts = {"the same in both": UNCHANGED, "different": DIFFERS, "only in the first": REMOVED, "only in the second": ADDED}
    words = ", ".join(f"{found[status]} {what}" for what, status in counts.items())
    names = f"; {moved} under another name in the first" if moved else ""
    return f"two backbones, {before.backbone} and {after.backbone}; rows: {words}{names}"


def _merged(old: list[str], new: list[str]) -> list[str]:
    """Names of both in one order: that of `new`, and what only `old` has before the next name that both have."""
    found: list[str] = []
    position = 0
    for name in new:
        if name in old:
            until = old.index(name)
            found += [n for n in old[position:until] if n not in new]
            position = max(position, until + 1)
        found.append(name)
    return found + [n for n in old if n not in new and n not in found]


def group_name(names: Sequence[str]) -> str:
    """`layer3.2-5 ×4` for layer3.2, layer3.3, layer3.4 and layer3.5; `layers.layer_0-2 ×3` where the last part is a name with a number."""
    if len(names) == 1:
        return names[0]
    if len({n.rpartition(".")[0] for n in names}) > 1:
        return f"{names[0]} … {names[-1]} ×{len(names)}"
    parent, dot, first = names[0].rpartition(".")
    last = names[-1].rpartition(".")[2]
    start, end = first.partition("-")[0], last.rpartition("-")[2]
    stem = start.rstrip("0123456789")
    if start != stem and end.startswith(stem) and end.removeprefix(stem).isdigit():
        end = end.removeprefix(stem)
    else:
        start, end = first, last
    return f"{parent}{dot}{start}-{end} ×{len(names)}"


def _heading(view: ModelView) -> dict[str, Any]:
    return {name: as_json(getattr(view, name)) for name in ("title", "backbone", "digest", "batch", "spec", "epoch", "totals")}
