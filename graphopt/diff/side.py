"""One side of a diff: a backbone as it is, or a plan in one of its phases, as rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.compiler.pass_base import RegionStatus
from graphopt.compiler.plan import Plan
from graphopt.diff.flow import edges, entering, figures, frontier, leaving, named, totals
from graphopt.diff.nodes import Joined, describe
from graphopt.diff.places import Place, Places
from graphopt.diff.rows import Band, NodeRow, PassLine, Row, Side
from graphopt.diff.status import ranked
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import activations
from graphopt.spec import dumps_pass

#: the stretch behind the last local module, which the network's own loss trains
REST = "rest"


def backbone_side(plan: Plan, title: str | None = None) -> Side:
    """The untouched backbone of a plan."""
    base, places = plan.base, Places(plan.base)
    held: dict[int, list[fx.Node]] = defaultdict(list)
    for node in base.nodes:
        if (index := places.of(node)) is not None and node.op not in ("placeholder", "output"):
            held[index].append(node)
    known = figures(plan.report.before, places.rows, base, held)
    active = activations(base)
    rows = tuple(
        Row(
            name=place.name,
            paths=place.paths,
            kind=place.kind,
            stage=place.stage,
            entering=entering(held[i], active),
            leaving=leaving(held[i], active),
            before=known[place.name],
            after=known[place.name],
            nodes=tuple(describe(base, n, active) for n in held[i]),
        )
        for i, place in enumerate(places.rows)
    )
    flows = edges(base, active, lambda n: _name(places, n))
    return Side(
        title=title or _backbone_name(plan),
        backbone=_identity(plan),
        digest=plan.digest,
        batch=plan.batch,
        spec=None,
        rows=rows,
        edges=flows,
        frontier=frontier(flows, {r.name for r in rows}),
        bands=(),
        passes=(),
        totals=totals(plan.report.before),
    )


def plan_side(plan: Plan, title: str | None = None, epoch: int | None = None) -> Side:
    """A plan in its phase: every row against the plan's own backbone (`was` is what it is there: kept)."""
    return _PlanSide(plan).build(title, epoch)


@dataclass
class _Said:
    """What is known of one row beyond its graph."""

    statuses: set[str] = field(default_factory=set)
    passes: set[int] = field(default_factory=set)
    reasons: dict[str, None] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


class _PlanSide:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.base, self.graph = plan, plan.base, plan.graph
        self.places = Places(plan.base)
        self.joined = Joined(plan.base, plan.graph)
        self.said: dict[int, _Said] = defaultdict(_Said)
        self.held: dict[int, list[fx.Node]] = defaultdict(list)
        self.original: dict[int, list[fx.Node]] = defaultdict(list)
        self.added: list[Place] = []
        self.beside: dict[str, str | None] = {}
        self.marks: list[tuple[int, str, RegionStatus]] = [
            (number, name, mark) for number, effect in enumerate(plan.effects) if effect for name, mark in effect.statuses.items()
        ]

    def build(self, title: str | None, epoch: int | None) -> Side:
        plan, places = self.plan, self.places
        for node in self.base.nodes:
            if node.op not in ("placeholder", "output") and (index := places.of(node)) is not None:
                self.original[index].append(node)
        self._find_added()
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output") and (index := self._row_of(node)) is not None:
                self.held[index].append(node)
        bands, band_of = self._bands()
        dropped, tap = self._dropped()
        for index in range(len(places.rows)):
            self._derive(index, dropped)
        self._hear_passes([b for b in bands if b.local])
        self._hear_marks()
        for band in bands:
            if band.local and band.name != REST:
                self.said[self._index(band.rows[-1])].statuses.add("isolated")
        before = figures(plan.report.before, places.rows, self.base, self.original)
        after = figures(plan.report.after, (*places.rows, *self.added), self.graph, self.held)
        rows = [self._row(i, place, before, after, band_of, dropped) for i, place in enumerate((*places.rows, *self.added))]
        names = {r.name: r for r in rows}
        flows = edges(self.graph, self.joined.active, self._name_of)
        live = {r.name for r in rows if r.backward}
        stops = {(a, b) for a, b in flows if a in live and b in live and band_of.get(a) != band_of.get(b) and self._parts(bands, a, b)}
        return Side(
            title=title or plan.name or _backbone_name(plan),
            backbone=_identity(plan),
            digest=plan.digest,
            batch=plan.batch,
            spec=getattr(plan.spec, "file", None),
            rows=tuple(_placed(rows)),
            edges=(*flows, *((b, n) for n, b in self.beside.items() if b in names and (b, n) not in flows)),
            frontier=tuple(sorted({*frontier(flows, live), *stops}, key=flows.index)),
            bands=bands,
            passes=tuple(_pass_lines(plan)),
            totals=totals(plan.report.after),
            tap=tap,
            epoch=epoch,
        )

    # -- where things are ---------------------------------------------------------------------------------------------------
    def _find_added(self) -> None:
        """Modules that passes put beside the backbone: as their marks say, else the outermost that hold parameters."""
        said = {name: mark for _, name, mark in self.marks if mark.status == "inserted"}
        known = {name for name, _ in self.base.module.named_modules()}
        fresh = [n for n, m in self.graph.module.named_modules() if n and n not in known and any(True for _ in m.parameters())]
        outer = [n for n in fresh if n.rpartition(".")[0] in known and self.places.of_path(n) is None]
        paths = dict.fromkeys(said)
        for path in outer:
            if not any(s == path or s.startswith(f"{path}.") for s in said):
                module = self.graph.module.get_submodule(path)
                inside = [f"{path}.{c}" for c, m in module.named_children() if any(True for _ in m.parameters())]
                paths.update(dict.fromkeys(inside if inside and not list(module.parameters(recurse=False)) else [path]))
        ends = [s for s in self.graph.sections if s.target]
        for number, path in enumerate(paths):
            try:
                kind = str(said[path].detail.get("kind", "")) if path in said else ""
                kind = kind or type(self.graph.module.get_submodule(path)).__name__
            except AttributeError:
                kind = kind or "inserted"
            hangs = said[path].sources[:1] if path in said else ()
            if hangs:
                touched = self.places.touched(hangs[0])
                self.beside[path] = self.places.rows[touched[-1]].name if touched else None
            elif number < len(ends):
                inside_rows = [i for n in ends[number].nodes if (i := self.places.of(n)) is not None]
                self.beside[path] = self.places.rows[max(inside_rows)].name if inside_rows else None
            else:
                self.beside[path] = None
            stages = {p.name: p.stage for p in self.places.rows}
            stage = stages.get(self.beside[path] or "", path.split(".")[0])
            self.added.append(Place(path, (path,), "" if kind == "Module" else kind, stage))

    def _row_of(self, node: fx.Node) -> int | None:
        target = str(node.target) if node.op in ("call_module", "get_attr") else node.meta["origin"].path
        # A pass's marker (an identity at a cut, without parameters) lies in the flow, not in the module that hangs beside it.
        inserted = node.op != "call_module" or any(True for _ in self.graph.module.get_submodule(target).parameters())
        for number, place in enumerate(self.added if inserted else ()):
            if target == place.name or target.startswith(f"{place.name}."):
                return len(self.places.rows) + number
        partner = self.joined.pairs.get(node)
        return self.places.of(partner if partner is not None else node)

    def _name_of(self, node: fx.Node) -> str | None:
        index = self._row_of(node) if node.op not in ("placeholder", "output") else None
        if index is None:
            return None
        rows = self.places.rows
        return rows[index].name if index < len(rows) else self.added[index - len(rows)].name

    def _index(self, name: str) -> int:
        return next(i for i, p in enumerate((*self.places.rows, *self.added)) if p.name == name)

    def _bands(self) -> tuple[tuple[Band, ...], dict[str, str]]:
        bands, of = [], {}
        majority: dict[int, Counter[str]] = defaultdict(Counter)
        for section in self.graph.sections:
            for node in section.nodes:
                if node in self.joined.active and (index := self._row_of(node)) is not None:
                    majority[index][section.name] += 1
        for section in self.graph.sections:
            sizes = {i: sum(n in self.joined.active for n in self.held[i]) for i in majority}
            rows = {i for i, votes in majority.items() if votes[section.name] * 2 >= sizes[i]}
            names = [p.name for i, p in enumerate((*self.places.rows, *self.added)) if i in rows]
            if not names:
                continue
            bands.append(Band(section.name, section.author.name, tuple(names), section.target))
            if section.target:
                of.update(dict.fromkeys(names, section.name))
        local = [b for b in bands if b.local]
        if local:
            rest = [p.name for i, p in enumerate(self.places.rows) if p.name not in of and self.held[i]]
            bands.append(Band(REST, local[-1].by, tuple(rest), True))
            of.update(dict.fromkeys(rest, REST))
        of.update({added: of[beside] for added, beside in self.beside.items() if beside in of})
        return tuple(bands), of

    def _parts(self, bands: Sequence[Band], a: str, b: str) -> bool:
        return any(band.local and (a in band.rows) != (b in band.rows) for band in bands)

    def _dropped(self) -> tuple[set[int], str | None]:
        cut = self.plan.needs.features
        if cut is None:
            return set(), None
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        end = self._row_of(cut.node)
        gone = {i for i, nodes in self.held.items() if nodes and max(order[n] for n in nodes) <= order[cut.node]}
        if end is not None:
            gone.add(end)
        return gone, self.places.rows[end].name if end is not None and end < len(self.places.rows) else None

    # -- what became of them ------------------------------------------------------------------------------------------------
    def _derive(self, index: int, dropped: set[int]) -> None:
        said, now = self.said[index], self.held[index]
        owned = {name: p for n in self.original[index] for name, p in named(self.base, n)}
        current = dict(self.graph.module.named_parameters())
        trained = [name for name, p in owned.items() if p.requires_grad]
        frozen = [name for name in trained if name in current and not current[name].requires_grad]
        if frozen:
            said.statuses.add("frozen")
            if len(frozen) < len(trained):
                said.detail["frozen"] = f"{len(frozen)} of {len(trained)} tensors"
        if index in dropped:
            said.statuses.add("dropped")
        gone = [n for n in self.joined.gone if n in set(self.original[index])]
        was_called = [n for n in self.original[index] if n.op == "call_module"]
        for node in now:
            if node in self.joined.pairs:
                continue
            for name, _ in named(self.graph, node):
                owner = self.places.of_path(name)
                if owner is not None and owner != index and name not in owned:
                    said.statuses.add("shared")
                    said.sources.setdefault(self.places.rows[owner].name)
        if "shared" in said.statuses:
            said.detail |= _coefficients(self.graph, self.places.rows[index], set(owned))
        emptied = was_called and all(n in gone for n in was_called) and not any(n.op == "call_module" for n in now)
        if emptied and "shared" not in said.statuses:
            said.statuses.add("bypassed")
        if not said.statuses and (gone or any(self.joined.statuses(n) != ("kept",) for n in now if not self._explained(n, index))):
            said.statuses.add("rewired")

    def _explained(self, node: fx.Node, index: int) -> bool:
        """Whether what became of a node is another row's matter: a sign at a cut, or its source went with the block before."""
        if node in self.joined.signs:
            return True
        before = self.joined.pairs.get(node)
        away = [i for i in before.all_input_nodes if i in self.joined.lost] if before is not None else []
        return self.joined.statuses(node) == ("rewired",) and bool(away) and all(self.places.of(i) != index for i in away)

    def _hear_passes(self, bands: Sequence[Band]) -> None:
        by_name = {p.name: i for i, p in reversed(list(enumerate(self.plan.passes)))}
        for number, report in enumerate(self.plan.report.passes):
            for region in report.regions if report.active else ():
                for index in self.places.touched(region):
                    self.said[index].passes.add(number)
            for note in report.diagnostics if report.active else ():
                for index in self.places.touched(note.location):
                    self.said[index].reasons.setdefault(f"{report.instance.value.name}: {note.message}")
        for index, nodes in self.held.items():
            self.said[index].passes |= {n.meta["pass"] for n in nodes if "pass" in n.meta}
        for index in range(len(self.places.rows), len(self.places.rows) + len(self.added)):
            name = self.added[index - len(self.places.rows)].name
            hangs = next((b.by for b in bands if self.beside.get(name) in b.rows), "")
            owner = by_name.get(name.split(".")[0], by_name.get(hangs))
            self.said[index].statuses.add("inserted")
            self.said[index].detail |= _parts_of(self.graph, self.added[index - len(self.places.rows)].name)
            self.said[index].passes |= {owner} if owner is not None else set()

    def _hear_marks(self) -> None:
        for number, name, mark in self.marks:
            added = [len(self.places.rows) + i for i, p in enumerate(self.added) if p.name == name]
            for index in added or self.places.touched(name):
                said = self.said[index]
                said.statuses.discard("rewired")
                said.statuses.add(mark.status)
                said.passes.add(number)
                said.detail |= {k: v for k, v in mark.detail.items() if k != "kind"}
                if mark.status != "inserted":
                    sources = [self.places.rows[i].name for s in mark.sources for i in self.places.touched(s)]
                    said.sources.update(dict.fromkeys(s for s in sources if s != self.places.rows[index].name))

    def _row(self, index: int, place: Place, before: Any, after: Any, band_of: Mapping[str, str], dropped: set[int]) -> Row:
        said, nodes = self.said[index], self.held[index]
        gone = [n for n in self.joined.gone if n in set(self.original[index])]
        # What is out of training does not train: saying so twice tells nothing.
        statuses = ranked(said.statuses - {"frozen"} if said.statuses & {"dropped", "bypassed"} else said.statuses)
        rows: list[NodeRow] = [self.joined.row(n) for n in nodes]
        rows += [describe(self.base, n, activations(self.base), ("bypassed",)) for n in gone]
        kept = nodes or self.original[index]
        active = self.joined.active if nodes else activations(self.base)
        reached = self.joined.grads & self.joined.active
        return Row(
            name=place.name,
            paths=place.paths,
            kind=place.kind,
            stage=place.stage,
            statuses=statuses,
            passes=tuple(sorted(said.passes)),
            reasons=tuple(said.reasons),
            sources=tuple(said.sources),
            detail=dict(sorted(said.detail.items())),
            band=band_of.get(place.name),
            beside=self.beside.get(place.name),
            backward=index not in dropped and ("inserted" in statuses or any(n in reached for n in nodes)),
            entering=entering(kept, active),
            leaving=leaving(kept, active),
            before=before.get(place.name),
            after=after.get(place.name),
            nodes=tuple(rows),
        )


def _placed(rows: list[Row]) -> Iterator[Row]:
    """Inserted rows come right behind the row they hang at."""
    behind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.beside:
            behind[row.beside].append(row)
    for row in rows:
        if not row.beside:
            yield row
            yield from behind.pop(row.name, ())


def _parts_of(graph: Graph, path: str) -> dict[str, Any]:
    """What an inserted module is made of: `{"head": "PoolHead", "decoder": "Linear"}`."""
    try:
        children = graph.module.get_submodule(path).named_children()
    except AttributeError:
        return {}
    return {name: type(child).__name__ for name, child in children if next(child.parameters(), None) is not None}


def _coefficients(graph: Graph, place: Place, owned: set[str]) -> dict[str, Any]:
    """Scalars that a pass put into a row: the weights of a mix."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in graph.module.named_parameters():
        if value.numel() == 1 and name not in owned and any(name.startswith(f"{p}.") for p in place.paths) and not value.is_meta:
            found[name.rpartition(".")[2]].append(float(value.detach()))
    return {k: round(v[0], 4) if len(set(v)) == 1 else f"{min(v):.3g} to {max(v):.3g}" for k, v in found.items()}


def _pass_lines(plan: Plan) -> Iterator[PassLine]:
    for number, report in enumerate(plan.report.passes):
        text = dumps_pass(report.value.table()).strip()
        yield PassLine(
            number,
            report.instance.value.name,
            report.instance.line,
            text,
            report.active,
            report.regions,
            tuple(str(n) for n in report.diagnostics),
        )


def _name(places: Places, node: fx.Node) -> str | None:
    index = places.of(node) if node.op not in ("placeholder", "output") else None
    return None if index is None else places.rows[index].name


def _backbone_name(plan: Plan) -> str:
    spec = getattr(plan.spec, "backbone", None)
    return f"{spec.source} {spec.name}" if spec is not None else type(plan.backbone).__name__


def _identity(plan: Plan) -> str:
    size = "×".join(map(str, plan.base.input))
    return f"{_backbone_name(plan)} {size}"
