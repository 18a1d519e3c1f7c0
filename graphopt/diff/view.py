"""A backbone as it is, or a plan in one of its phases, as rows: put together from what passes declared and the editor recorded."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from torch.fx import Node

from graphopt.compiler.pass_base import Status
from graphopt.compiler.plan import Plan
from graphopt.cost.figures import Cost
from graphopt.diff.flow import (
    Edge,
    describe,
    edges_between_rows,
    figures,
    input_shape,
    output_shape,
    reached_by_backward,
    structures,
    totals,
)
from graphopt.diff.model import ModelView, NodeRow, PassInfo, Row, SectionBox, ranked
from graphopt.diff.record import Records, RowRecord
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import tensors_of
from graphopt.ir.nodes import activations, parameters_read, trainable
from graphopt.spec import dumps_pass

#: name of the box around what follows the last local module, and trains with the network's own loss
LAST_MODULE = "last module"


def backbone_view(plan: Plan, title: str | None = None) -> ModelView:
    """The untouched backbone of a plan."""
    return _ViewBuilder(plan, plan.base, plan.report.before).build(title or _backbone_name(plan), None)


def plan_view(plan: Plan, title: str | None = None, epoch: float | None = None, runs: Sequence[range] = ()) -> ModelView:
    """A plan in its phase; `runs` are the local modules of each rank of a chain, if it trains on one."""
    file = _spec_file(plan)
    # The spec of a run is called by the run's folder.
    name = title or plan.name or (file.parent.name if file.name == "spec.toml" else file.stem) or _backbone_name(plan)
    return _ViewBuilder(plan, plan.graph, plan.report.after, runs).build(name, epoch)


class _ViewBuilder:
    def __init__(self, plan: Plan, graph: Graph, cost: Cost | None, runs: Sequence[range] = ()) -> None:
        self.plan, self.base, self.graph, self.cost = plan, plan.base, graph, cost
        #: of each local module, the rank; a chain begins at the highest
        self.ranks = dict(enumerate(len(runs) - 1 - place for place, run in enumerate(runs) for _ in run))
        self.rewritten = graph is not plan.base
        self.records = Records(plan, graph)

    def build(self, title: str, epoch: float | None) -> ModelView:
        plan = self.plan
        sections, section_of = self._sections()
        before_cut, feature_input = self._before_cut()
        for row in self.records.rows:
            if not row.statuses and row.edited:
                row.statuses.add(Status.REWIRED)
        rows = self._rows(section_of, before_cut)
        edges, stops = self._edges(rows, section_of)
        backbone = f"{_backbone_name(plan)} {' and '.join('×'.join(map(str, shape)) or '1' for shape, _ in tensors_of(self.base.input))}"
        spec, passes = (_spec_file(plan).name or None, tuple(_pass_infos(plan))) if self.rewritten else (None, ())
        rows, step = tuple(_after_their_rows(rows)), totals(self.cost)
        return ModelView(title, backbone, plan.digest, plan.batch, spec, rows, edges, stops, sections, passes, step, feature_input, epoch)

    def _sections(self) -> tuple[tuple[SectionBox, ...], dict[str, str]]:
        """The sections as boxes around rows, and for each row in a local module the name of that."""
        boxes: list[SectionBox] = []
        section_of: dict[str, str] = {}
        active = activations(self.graph)
        local = itertools.count()
        for section in self.graph.sections:
            rank = self.ranks.get(next(local)) if section.target else None
            inside = Counter(row.name for n in section.nodes if n in active and (row := self.records.of(n)))
            rows = [r for r in self.records.rows if inside[r.name] and 2 * inside[r.name] >= sum(n in active for n in r.nodes)]
            names = tuple(r.name for r in rows)
            if names:
                boxes.append(SectionBox(section.name, names, section.target, rank))
            if rows and section.target:
                section_of |= dict.fromkeys(names, section.name)
                for row in rows:
                    row.statuses.add(Status.ISOLATED)
                    row.passes.add(section.author.index)
        if section_of:
            others = tuple(r.name for r in self.records.rows if r.name not in section_of and r.nodes)
            boxes.append(SectionBox(LAST_MODULE, others, True, self.ranks.get(next(local))))
            section_of |= dict.fromkeys(others, LAST_MODULE)
        section_of |= {r.name: section_of[r.attached_to] for r in self.records.rows if r.attached_to in section_of}
        return tuple(boxes), section_of

    def _before_cut(self) -> tuple[set[str], str | None]:
        """Names of the rows that have left the training graph, and of the one whose output is cached."""
        cut = self.plan.needs.features if self.rewritten else None
        if cut is None:
            return set(), None
        order, last = self.graph.order, self.records.of(cut.node)
        gone = [r for r in self.records.rows if r is last or (r.nodes and order[r.nodes[-1]] <= order[cut.node])]
        cutting = {index: effects for index, effects, _ in self.records.done if effects.needs.features is cut}
        dropped = [s for effects in cutting.values() for s in effects.statuses.values() if s.status is Status.DROPPED]
        detail = {key: value for status in dropped for key, value in status.detail.items()}
        for row in gone:  # what lies between the regions that the pass names is gone, too
            row.statuses.add(Status.DROPPED)
            row.passes |= cutting.keys()
            row.detail |= detail
        return {r.name for r in gone}, None if last is None else last.name

    def _edges(self, rows: Sequence[Row], section_of: dict[str, str]) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
        """The edges, and those of them over which no gradient comes back although it reaches their end."""

        def name_of(node: Node) -> str | None:
            row = self.records.of(node)
            return None if row is None else row.name

        edges = edges_between_rows(self.graph, name_of)
        live = {r.name for r in rows if r.backward}
        stops = tuple((a, b) for a, b in edges if b in live and (a not in live or section_of.get(a) != section_of.get(b)))
        attached = ((r.attached_to, r.name) for r in self.records.rows if r.attached_to is not None)
        return tuple(dict.fromkeys((*edges, *attached))), stops

    def _rows(self, section_of: dict[str, str], before_cut: set[str]) -> tuple[Row, ...]:
        locations = [r.location for r in self.records.rows]
        base_rows = self.records.map.rows
        before = figures(self.plan.report.before, base_rows, self.base, [r.original for r in self.records.rows[: len(base_rows)]])
        after = figures(self.cost, locations, self.graph, [r.nodes for r in self.records.rows])
        reached = reached_by_backward(self.graph)
        known, found = self.base.cached(structures), []
        for row in self.records.rows:
            exact, operators = known.get(row.name, ("", ""))
            graph, nodes = (self.graph, row.nodes) if row.nodes else (self.base, row.original)
            hidden = {Status.FROZEN} if row.statuses & {Status.DROPPED, Status.BYPASSED} else set()  # what is out does not train anyway
            found.append(
                Row(
                    **vars(row.location),
                    statuses=ranked(row.statuses - hidden),
                    passes=tuple(sorted(row.passes)),
                    messages=tuple(row.messages),
                    sources=tuple(row.sources),
                    detail=dict(sorted(row.detail.items())),
                    section=section_of.get(row.name),
                    attached_to=row.attached_to,
                    backward=row.name not in before_cut and (Status.INSERTED in row.statuses or not reached.isdisjoint(row.nodes)),
                    input_shape=input_shape(graph, nodes),
                    output_shape=output_shape(graph, nodes),
                    before=before.get(row.name),
                    after=after[row.name],
                    nodes=tuple(self._node_rows(row)),
                    structure=exact,
                    operators=operators,
                )
            )
        return tuple(found)

    def _node_rows(self, row: RowRecord) -> Iterator[NodeRow]:
        """The row's operations, and after them those that are gone."""
        for node in row.nodes:
            yield describe(self.graph, node, self._node_statuses(node, row.edited))
        for node in row.original:
            if node.name in self.records.erased:
                yield describe(self.base, node, (Status.BYPASSED,))

    def _node_statuses(self, node: Node, edited: bool) -> tuple[str, ...]:
        """What became of a node. That it reads another node now counts in an edited row only: else another row's edit is the cause."""
        records = self.records
        if node.name in records.inserted:
            return (Status.INSERTED,)
        statuses = set()
        if node.name in records.changed or (edited and node.name in records.redirected):
            statuses.add(Status.REWIRED)
        if any(name in records.frozen for name, _ in parameters_read(self.graph.module, node)) and not trainable(self.graph, node):
            statuses.add(Status.FROZEN)
        return ranked(statuses)


def _after_their_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Inserted rows come right after the row they are attached to."""
    attached: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        attached[row.attached_to].append(row)
    for row in attached[None]:
        yield row
        yield from attached[row.name]


def _pass_infos(plan: Plan) -> Iterator[PassInfo]:
    for report in plan.report.passes:
        value, index = report.instance.value, report.instance.index
        text = dumps_pass(value.table()).strip()
        diagnostics = tuple(map(str, report.diagnostics))
        yield PassInfo(index, value.name, report.instance.line, text, report.active, report.regions, diagnostics)


def _spec_file(plan: Plan) -> PurePath:
    return PurePath(getattr(plan.spec, "file", None) or "")


def _backbone_name(plan: Plan) -> str:
    spec = getattr(plan.spec, "backbone", None)
    return f"{spec.source} {spec.name}" if spec is not None else type(plan.backbone).__name__
