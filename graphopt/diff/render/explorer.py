"""The diff for Google's Model Explorer: a graph collection, and node data that colours it by status.

Format: github.com/google-ai-edge/model-explorer, "Develop adapter extension" (GraphCollection) and "Node data" (a results map by node id
with gradient or threshold). Every operation is a node; its namespace is its module path, so stages and blocks fold there too.
"""

from collections.abc import Iterable
from typing import Any

from graphopt.diff.align import Diff
from graphopt.diff.model import KEPT, STYLES, NodeRow, Row
from graphopt.diff.render.words import glyphs, passes_of, shape


def to_model_explorer(diff: Diff) -> dict[str, Any]:
    """`{"graphs": [...]}`: one graph with all nodes of both models."""
    known = {name for row in diff.rows for name in ([n.name for n in row.nodes] or [row.name])}
    rows = {row.name: row for row in diff.rows}
    nodes = []
    for row in diff.rows:
        nodes += [_node(diff, row, node, known) for node in row.nodes]
        if not row.nodes:  # a module that runs outside the flat graph: an auxiliary head
            attached = rows[row.attached_to].nodes[-1:] if row.attached_to else ()
            head = {"id": row.name, "label": row.kind or row.name, "namespace": row.stage, "attrs": _attributes(diff, row)}
            nodes.append({**head, "incomingEdges": _edges((n.name for n in attached), known)})
    return {"label": diff.after.title, "graphs": [{"id": "diff", "nodes": nodes}]}


def to_node_data(diff: Diff) -> dict[str, Any]:
    """Node id -> status, with one colour per status, to load along with the graph."""
    results = {}
    for row in diff.rows:
        for name, statuses in [(n.name, n.statuses) for n in row.nodes] or [(row.name, row.statuses)]:
            main = next((s for s in (*statuses, *row.statuses) if s != KEPT), KEPT)
            results[name] = {"value": f"{glyphs([main])} {main}", "bgColor": _tint(STYLES[main].light)}
    return {"diff": {"results": results}}


def _node(diff: Diff, row: Row, node: NodeRow, known: set[str]) -> dict[str, Any]:
    return {
        "id": node.name,
        "label": node.what,
        "namespace": node.path.replace(".", "/"),
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
