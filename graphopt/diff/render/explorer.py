"""The diff for Google's Model Explorer: a graph collection, and node data that colours it by status.

Format: github.com/google-ai-edge/model-explorer, "Develop adapter extension" (GraphCollection) and "Node data" (a results map by node id
with gradient or threshold). Every operation is a node; its namespace is its module path, so stages and blocks fold there too.
"""

from __future__ import annotations

from typing import Any

from graphopt.diff.join import Diff
from graphopt.diff.render.words import passes_of, shape
from graphopt.diff.rows import NodeRow, Row
from graphopt.diff.status import look


def to_model_explorer(diff: Diff) -> dict[str, Any]:
    """`{"graphs": [...]}`: one graph with all nodes of both sides."""
    nodes = [_node(diff, row, node) for row in diff.rows for node in row.nodes]
    known = {n["id"] for n in nodes}
    for row in diff.rows:
        if not row.nodes:  # a module that runs outside the flat graph: an auxiliary head
            nodes.append({"id": row.name, "label": row.kind or row.name, "namespace": row.stage, "attrs": _attrs(diff, row)})
            inputs = [n.name for r in diff.rows if r.name == row.beside for n in r.nodes[-1:]]
            nodes[-1]["incomingEdges"] = [{"sourceNodeId": i, "sourceNodeOutputId": "0", "targetNodeInputId": "0"} for i in inputs]
            known.add(row.name)
    for node in nodes:
        node["incomingEdges"] = [e for e in node["incomingEdges"] if e["sourceNodeId"] in known]
    return {"label": diff.after.title, "graphs": [{"id": "diff", "nodes": nodes}]}


def to_node_data(diff: Diff) -> dict[str, Any]:
    """The overlay: node id -> status, with one colour per status; load it beside the graph."""
    results = {}
    for row in diff.rows:
        for name, statuses in [(n.name, n.statuses) for n in row.nodes] or [(row.name, row.statuses)]:
            main = next((s for s in (*statuses, *row.statuses) if s != "kept"), "kept")
            results[name] = {"value": f"{look(main).glyph} {main}", "bgColor": _tint(look(main).light)}
    return {"diff": {"results": results}}


def _node(diff: Diff, row: Row, node: NodeRow) -> dict[str, Any]:
    return {
        "id": node.name,
        "label": node.what,
        "namespace": node.path.replace(".", "/"),
        "incomingEdges": [
            {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(number)} for number, name in enumerate(node.inputs)
        ],
        "attrs": [{"key": "status", "value": ", ".join(node.statuses)}, *_attrs(diff, row)],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": shape(node.shape)}]}],
    }


def _attrs(diff: Diff, row: Row) -> list[dict[str, str]]:
    pairs = {
        "block": row.name,
        "block status": ", ".join(row.statuses),
        "pass": passes_of(row, diff.after.passes),
        "reason": "; ".join(row.reasons),
        "sources": ", ".join(row.sources),
        **{k: str(v) for k, v in row.detail.items()},
    }
    for side in ("before", "after"):
        pairs |= {f"{k}, {side}": str(v) for k, v in (getattr(row, side) or {}).items()}
    return [{"key": k, "value": v} for k, v in pairs.items() if v]


def _tint(colour: str) -> str:
    """A pale ground on which black text reads: a quarter of the colour."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - p) * 0.35):02x}" for p in parts)
