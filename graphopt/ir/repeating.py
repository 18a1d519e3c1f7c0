"""Nodes that can run a second time from the same inputs, as checkpointing needs it."""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from graphopt.ir.editor import Editor
from graphopt.ir.graph import Graph
from graphopt.ir.nodes import Memory, can_leave_its_input, storages, writes_in_place


def repeatable(edit: Editor, nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """Nodes that find their inputs as they were when they run again: what writes into one in place writes into a copy of it.

    Returns None where that would be seen, or where what follows overwrites an input.
    """
    graph, inside = edit.graph, set(nodes)
    inputs = {i for n in nodes for i in n.all_input_nodes if i not in inside and i.op != "get_attr"}
    held = set[Any]().union(*map(storages, inputs))
    found = {w for memory in held for w in graph.cached(_writers).get(memory, ())}
    if not found:
        return tuple(nodes)
    order = dict(graph.order)
    memory = Memory(order)
    first = min(order[n] for n in nodes)
    writers: list[Node] = []
    for node in sorted(w for w in found if order[w] >= first):
        written = memory.of[node.all_input_nodes[0]] & held
        if not written:
            continue
        if node not in inside or not can_leave_its_input(node, order, memory):
            return None
        writers.append(node)
        held -= written  # what is written later is the copy
    copies = []
    for node in writers:
        source = node.all_input_nodes[0]
        later = [u for u in source.users if order[u] > order[node]]
        copies.append(edit.call("clone", (source,), before=node))
        edit.redirect(source, copies[-1], [node])
        edit.redirect(source, node, later)
        order[copies[-1]] = order[node]
    return (*nodes, *copies)


def _writers(graph: Graph) -> dict[Any, list[Node]]:
    """The nodes that write into each memory in place."""
    found: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.all_input_nodes and writes_in_place(graph.module, node):
            for memory in storages(node.all_input_nodes[0]):
                found.setdefault(memory, []).append(node)
    return found
