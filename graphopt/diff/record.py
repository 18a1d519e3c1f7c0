"""What passes declared and the editor recorded, row by row."""

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from graphopt.compiler.pass_base import Effects, Status
from graphopt.compiler.plan import Plan
from graphopt.diff.locate import RowMap
from graphopt.diff.model import RowLocation
from graphopt.ir.editor import Edits
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import parameters_read
from graphopt.ir.paths import is_below, owner


@dataclass
class RowRecord:
    """What is known of one row.

    Attributes:
        attached_to: of an inserted row, the name of the row it reads.
        nodes: in the graph that is shown. original: in the backbone. edited: whether a pass changed any of them.
    """

    location: RowLocation
    attached_to: str | None = None
    nodes: list[Node] = field(default_factory=list)
    original: list[Node] = field(default_factory=list)
    edited: bool = False
    statuses: set[str] = field(default_factory=set)
    passes: set[int] = field(default_factory=set)
    messages: dict[str, None] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name."""
        return self.location.name


class Records:
    """The rows of a graph, with what every pass that has fired did to each.

    Attributes:
        rows: the backbone's in execution order, then the inserted ones.
        done: of every pass that has fired: its number, what it declared, and what the editor recorded. Nothing for a bare backbone.
        inserted, changed, redirected, erased: names of nodes. frozen: names of parameters.
    """

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan, self.base, self.graph = plan, plan.base, graph
        rewritten = zip(plan.effects, plan.edits, strict=True) if graph is not plan.base else ()
        self.done: list[tuple[int, Effects, Edits]] = [(i, effect, edit) for i, (effect, edit) in enumerate(rewritten) if effect and edit]
        kinds = ("inserted", "changed", "redirected", "erased", "frozen")
        self.inserted, self.changed, self.redirected, self.erased, self.frozen = (
            {name for _, _, edits in self.done for name in getattr(edits, kind)} for kind in kinds
        )
        self.map = self.base.cached(RowMap)
        self.rows = [RowRecord(location) for location in self.map.rows]
        self._by_name = {row.name: row for row in self.rows}
        self._region_paths = {r.name: r.paths for m in plan.matched for r in m.match.regions}
        self._declared = {i: {row.name for name in effects.statuses for row in self.named(name)} for i, effects, _ in self.done}
        self._add_inserted_rows()
        self._assign_nodes()
        self._add_frozen()
        self._add_statuses_and_messages()

    def of(self, node: Node) -> RowRecord | None:
        """The row of a node of either graph."""
        if node.name in self.inserted and any(True for _ in parameters_read(self.graph.module, node)):
            for row in self.rows[len(self.map.rows) :]:
                if is_below(str(node.target), (row.name,)):
                    return row
        index = self.map.of(node)
        if index is None:
            return None
        declared = self._declared.get(node.meta.get("pass", -1), set()) if node.name in self.inserted else set()
        if declared and self.rows[index].name not in declared:  # put before what the pass acts on, so it has its origin in front of that
            readers = [self.rows[i] for user in node.users if (i := self.map.of(user)) is not None]
            return next((row for row in readers if row.name in declared), self.rows[index])
        return self.rows[index]

    def named(self, name: str) -> list[RowRecord]:
        """The rows of a region, of a path, or of that name."""
        if name in self._by_name:
            return [self._by_name[name]]
        return [self.rows[i] for i in dict.fromkeys(i for p in self._region_paths.get(name, (name,)) for i in self.map.named(p))]

    def _add_inserted_rows(self) -> None:
        """A row for every module that passes added outside of the backbone's own: as they say, else where it has parameters."""
        modules = dict(self.graph.module.named_modules())
        for index, effects, edits in self.done:
            for name, status in effects.statuses.items():
                if status.status is Status.INSERTED:
                    rows = self.named(status.sources[0]) if status.sources else ()
                    self._insert_row(name, type(modules.get(name)).__name__, index, rows[-1] if rows else None)
            for name in edits.added:
                path = name if name in modules else owner(name)
                module = modules.get(path) if path and self.map.of_path(path) is None else None
                if module is not None and any(True for _ in module.parameters()) and not is_below(path, self._by_name):
                    calls = self.graph.fx.find_nodes(op="call_module", target=path)
                    reads = (self.of(source) for call in calls for source in call.all_input_nodes)
                    self._insert_row(path, type(module).__name__, index, next(reads, None))

    def _insert_row(self, name: str, kind: str, index: int, attached_to: RowRecord | None) -> None:
        stage = attached_to.location.stage if attached_to else name.split(".")[0]
        location = RowLocation(name, (name,), "" if kind in ("Module", "NoneType") else kind, stage)
        row = RowRecord(location, attached_to.name if attached_to else None, statuses={Status.INSERTED}, passes={index})
        self.rows.append(row)
        self._by_name[name] = row

    def _assign_nodes(self) -> None:
        for graph, kind in ((self.base, "original"), (self.graph, "nodes")):
            for node in graph.nodes:
                if (row := self.of(node)) is not None:
                    getattr(row, kind).append(node)
        for row in self.rows:
            names = {n.name for n in (*row.original, *row.nodes)}
            for index, _, edits in self.done:
                if any(name in names for done in (edits.inserted, edits.changed, edits.erased) for name in done):
                    row.edited = True
                    row.passes.add(index)

    def _add_frozen(self) -> None:
        for row in self.rows:
            reads = (item for node in row.original for item in parameters_read(self.base.module, node))
            names = {name for name, parameter in reads if parameter.requires_grad}
            row.passes |= {index for index, _, edits in self.done if names & edits.frozen.keys()}
            if frozen := names & self.frozen:
                row.statuses.add(Status.FROZEN)
                if len(frozen) < len(names):
                    row.detail["frozen"] = f"{len(frozen)} of {len(names)} tensors"

    def _add_statuses_and_messages(self) -> None:
        for index, effects, _ in self.done:
            for name, status in effects.statuses.items():
                for row in self.named(name):
                    row.statuses.add(status.status)
                    row.passes.add(index)
                    row.detail |= status.detail
                    if status.skip_probability:
                        row.detail.setdefault("probability", round(status.skip_probability, 4))
                    if status.status is not Status.INSERTED:
                        sources = (source.name for name in status.sources for source in self.named(name))
                        row.sources.update(dict.fromkeys(name for name in sources if name != row.name))
            report = self.plan.report.passes[index]
            for diagnostic in report.diagnostics:
                for row in self.named(diagnostic.location):
                    row.messages.setdefault(f"{report.instance.value.name}: {diagnostic.message}")
