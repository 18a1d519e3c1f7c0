"""The diff for Google's Model Explorer: graphs, node data that colours them by status, and the data for comparing two of them.

Formats: github.com/google-ai-edge/model-explorer, `input_graph.ts` (GraphCollection), `types.ts` (NodeDataProviderData) and
`sync_navigation.ts` (SyncNavigationData). Every operation is a node; its namespace is its module path, so stages and blocks fold there too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from graphopt.compiler.pass_base import Status
from graphopt.diff.align import Diff
from graphopt.diff.match import matched_operations
from graphopt.diff.model import ADDED, REMOVED, STYLES, UNCHANGED, NodeRow, Row
from graphopt.diff.render.words import glyphs, passes_of, shape


def to_model_explorer(diff: Diff) -> dict[str, Any]:
    """A GraphCollection of three graphs: "diff" with the nodes of both models, "before" and "after" for two panes side by side."""
    graphs = [{"id": name, "nodes": list(_nodes(diff, rows))} for name, rows in _rows(diff).items()]
    return {"label": diff.after.title, "graphs": graphs, "graphSorting": "name_desc"}  # the diff is shown first


def to_node_data(diff: Diff) -> dict[str, Any]:
    """NodeDataProviderData: in each graph, node id -> status, with one colour per status."""
    found = {}
    for graph, rows in _rows(diff).items():
        results = {}
        for row in rows:
            for name, statuses in _entries(row):
                main = next((s for s in (*statuses, *row.statuses) if s != UNCHANGED), UNCHANGED)
                results[name] = {"value": f"{glyphs([main])} {main}", "bgColor": _tint(STYLES[main].light)}
        found[graph] = {"name": "status", "results": results}
    return found


def to_sync_navigation(diff: Diff) -> dict[str, Any]:
    """SyncNavigationData for "before" on the left and "after" on the right: what is selected on one side is found on the other.

    A node or a layer is in one entry at most. One that is in none is only in one of the models, and gets a border there.
    """
    old, new = ({row.name: row for row in view.rows} for view in (diff.before, diff.after))
    pairs = [pair for name in new if name in old for pair in _pairs(old[name], new[name], diff.same_backbone)]
    pairs += [(f"{left}{_LAYER}", f"{right}{_LAYER}") for left, right in _layers(diff, pairs).items()]
    return {
        "type": "sync_navigation",
        "mappingEntries": [{"leftNodeIds": [left], "rightNodeIds": [right]} for left, right in pairs],
        "disableMappingFallback": True,
        "showDiffHighlights": True,
        "deletedNodesBorderColor": STYLES[REMOVED].light,
        "deletedNodesBorderWidth": 3,
        "newNodesBorderColor": STYLES[ADDED].light,
        "newNodesBorderWidth": 3,
        "relatedNodesBorderColor": STYLES[Status.ISOLATED].light,
        "relatedNodesBorderWidth": 2,
    }


#: what Model Explorer adds to the namespace of a layer for its identifier
_LAYER = "___group___"


def _layers(diff: Diff, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The layers around nodes that are each other's, from the outside in: namespace on the left -> the one on the right, each once."""
    rows = _rows(diff)
    left, right = ({node.name: _namespace(row, node) for row in rows[side] for node in row.nodes} for side in ("before", "after"))
    found: dict[str, str] = {}
    for one, other in pairs:
        for former, now in zip(_enclosing(left.get(one, "")), _enclosing(right.get(other, "")), strict=False):
            if former not in found and now not in found.values():
                found[former] = now
    return found


def _enclosing(namespace: str) -> Iterator[str]:
    """`"a/b"` as `"a"`, `"a/b"`."""
    return accumulate(namespace.split("/"), "{}/{}".format) if namespace else iter(())


def _namespace(row: Row, node: NodeRow) -> str:
    return (node.path or row.name).replace(".", "/")


def _rows(diff: Diff) -> dict[str, list[Row]]:
    """The rows of each graph, all with their statuses in the diff; those of one model without the operations that it does not have."""
    shown = {row.name: row for row in diff.rows}
    after = [replace(shown[row.name], nodes=_own(shown[row.name])) for row in diff.after.rows]
    before = []
    for row in diff.before.rows:
        statuses = {node.name: node.statuses for node in shown[row.name].nodes}
        nodes = tuple(replace(node, statuses=statuses.get(node.name, node.statuses)) for node in _own(row))
        before.append(replace(row, statuses=shown[row.name].statuses, passes=shown[row.name].passes, nodes=nodes))
    return {"diff": list(diff.rows), "before": before, "after": after}


def _own(row: Row) -> tuple[NodeRow, ...]:
    """The operations that a row has, without those that are gone."""
    return tuple(node for node in row.nodes if not {Status.BYPASSED, REMOVED} & set(node.statuses))


def _pairs(old: Row, new: Row, same_backbone: bool) -> list[tuple[str, str]]:
    """Which operations of two matching rows are each other's."""
    if not old.nodes and not new.nodes:
        return [(one, other) for (one, _), (other, _) in zip(_entries(old), _entries(new), strict=False)]
    before, after = _own(old), _own(new)
    if same_backbone:
        known = {node.name for node in after}
        return [(node.name, node.name) for node in before if node.name in known]
    return [(one.name, other.name) for one, other in matched_operations(before, after)]


def _entries(row: Row) -> list[tuple[str, tuple[str, ...]]]:
    """Identifier and statuses of each node of a row: its operations, or itself, for a module that runs outside of the flat graph."""
    alone = [(row.name, row.statuses)] if row.attached_to and not row.nodes else []
    return [(node.name, node.statuses) for node in row.nodes] or alone


def _nodes(diff: Diff, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    known = {name for row in rows for name, _ in _entries(row)}
    by_name = {row.name: row for row in rows}
    for row in rows:
        yield from (_node(diff, row, node, known) for node in row.nodes)
        if row.attached_to and not row.nodes:
            sources = [node.name for node in by_name[row.attached_to].nodes[-1:]]
            place = {"namespace": row.stage.replace(".", "/"), "incomingEdges": _edges(sources, known)}
            yield {"id": row.name, "label": row.kind or row.name, **place, "attrs": _attributes(diff, row)}


def _node(diff: Diff, row: Row, node: NodeRow, known: set[str]) -> dict[str, Any]:
    return {
        "id": node.name,
        "label": node.what,
        "namespace": _namespace(row, node),
        "incomingEdges": _edges(node.inputs, known),
        "attrs": [{"key": "status", "value": ", ".join(node.statuses)}, *_attributes(diff, row)],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": shape(node.shape)}]}],
    }


def _edges(inputs: Iterable[str], known: set[str]) -> list[dict[str, str]]:
    found = ((str(i), name) for i, name in enumerate(inputs) if name in known)
    return [{"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": number} for number, name in found]


def _attributes(diff: Diff, row: Row) -> list[dict[str, str]]:
    pairs = {
        "block": row.name,
        "block status": ", ".join(row.statuses),
        "pass": passes_of(diff, row),
        "message": "; ".join(row.messages),
        "sources": ", ".join(row.sources),
        **row.detail,
        **{f"{k}, before": v for k, v in (row.before or {}).items()},
        **{f"{k}, after": v for k, v in (row.after or {}).items()},
    }
    return [{"key": k, "value": str(v)} for k, v in pairs.items() if v != ""]


def _tint(colour: str) -> str:
    """A pale ground on which black text reads: a third of the colour."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - p) * 0.35):02x}" for p in parts)
