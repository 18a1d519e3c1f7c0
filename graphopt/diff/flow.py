"""What flows between rows, where the backward stops, and what each row costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from graphopt.diff.nodes import parameters, shape
from graphopt.diff.places import Place
from graphopt.diff.rows import FIGURES
from graphopt.ir.graph import Graph

#: what of a step's costs the pictures show
TOTALS = (*FIGURES, "peak_bytes", "peak_activation_bytes")


def named(graph: Graph, node: fx.Node) -> list[tuple[str, Any]]:
    found = parameters(graph, node)
    if node.op == "get_attr":
        return [(str(node.target), p) for p in found]
    return [(f"{node.target}.{n}", p) for n, p in graph.module.get_submodule(str(node.target)).named_parameters()] if found else []


def edges(graph: Graph, active: set[fx.Node], name_of: Callable[[fx.Node], str | None]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        if node in active and (mine := name_of(node)) is not None:
            for source in node.all_input_nodes:
                if source in active and (theirs := name_of(source)) is not None and theirs != mine:
                    found.setdefault((theirs, mine))
    return tuple(found)


def frontier(edges: Iterable[tuple[str, str]], live: set[str]) -> tuple[tuple[str, str], ...]:
    """The edges over which no gradient flows although it could reach their end."""
    return tuple((a, b) for a, b in edges if b in live and a not in live)


def entering(nodes: Sequence[fx.Node], active: set[fx.Node]) -> tuple[str | int, ...] | None:
    members = set(nodes)
    return next((shape(i) for n in nodes if n in active for i in n.all_input_nodes if i not in members and i in active), None)


def leaving(nodes: Sequence[fx.Node], active: set[fx.Node]) -> tuple[str | int, ...] | None:
    members = set(nodes)
    return next((shape(n) for n in reversed(nodes) if n in active and any(u not in members for u in n.users)), None)


def figures(cost: Any, places: Sequence[Place], graph: Graph, held: Mapping[int, Sequence[fx.Node]]) -> dict[str, dict[str, int]]:
    """Per row: the cost model's figures, or without one the parameters alone, each counted where it is first read."""
    if cost is not None and hasattr(cost, "by"):
        whole = [p for p in places if p.paths]
        found = {b.path: {k: int(getattr(b, k)) for k in FIGURES} for b in cost.by(whole)}
        return {p.name: found.get(p.name, dict.fromkeys(FIGURES, 0)) for p in places}
    seen: set[int] = set()
    result = {}
    for index, place in enumerate(places):
        fresh = []
        for _, parameter in (item for n in held.get(index, ()) if n.op != "get_attr" or "pass" not in n.meta for item in named(graph, n)):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                fresh.append(parameter)
        result[place.name] = {
            "parameters": sum(p.numel() for p in fresh),
            "trainable_parameters": sum(p.numel() for p in fresh if p.requires_grad),
        }
    return result


def totals(cost: Any) -> dict[str, int] | None:
    return None if cost is None else {k: int(getattr(cost, k)) for k in TOTALS if hasattr(cost, k)}
