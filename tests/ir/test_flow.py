"""Walks over graphs, compared with definitions that are slower and plainer."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node

from graphopt import Graph
from graphopt.ir.flow import ancestors, between, cut_points, descendants, is_convex, reentry, slice_around
from graphopt.ir.nodes import activations
from tests.support.graphs import dags, graph_of, node


def as_networkx(graph: Graph) -> nx.DiGraph:
    made = nx.DiGraph()
    made.add_nodes_from(graph.nodes)
    made.add_edges_from((i, n) for n in graph.nodes for i in n.all_input_nodes)
    return made


@settings(max_examples=15)
@given(dags(), st.data())
def test_walks_find_what_is_reachable(graph: Graph, data: st.DataObject) -> None:
    reference = as_networkx(graph)
    start, end = (data.draw(st.sampled_from(graph.nodes)) for _ in range(2))
    assert ancestors([start]) == nx.ancestors(reference, start) | {start}
    assert descendants([start]) == nx.descendants(reference, start) | {start}
    on_paths = {n for path in nx.all_simple_paths(reference, start, end) for n in path} if start is not end else {start}
    assert between([start], [end]) == on_paths
    assert between([start], [start]) == {start}


def test_a_slice_of_the_order_is_convex() -> None:
    graph = graph_of(lambda m, x: (x + 1).tanh().neg().exp())
    assert [n.name for n in slice_around(graph, [node(graph, "neg"), node(graph, "add")])] == ["add", "tanh", "neg"]
    assert is_convex(graph, slice_around(graph, [node(graph, "exp"), node(graph, "add")]))


@settings(max_examples=15)
@given(dags(), st.data())
def test_a_set_is_convex_if_no_path_comes_back(graph: Graph, data: st.DataObject) -> None:
    reference = as_networkx(graph)
    chosen = set(data.draw(st.lists(st.sampled_from(graph.nodes), max_size=5)))
    pairs = itertools.permutations(chosen, 2)
    outside = {n for a, b in pairs for n in nx.descendants(reference, a) & nx.ancestors(reference, b)} - chosen
    assert is_convex(graph, chosen) is not bool(outside)
    found = reentry(graph.nodes, chosen)
    assert found in outside if outside else found is None


@settings(max_examples=15)
@given(dags())
def test_cut_points_are_what_no_path_goes_around(graph: Graph) -> None:
    active = activations(graph)
    reference = as_networkx(graph).subgraph(active | {graph.output})
    expected = []
    for candidate in graph.nodes:
        if candidate in active - {graph.placeholder}:
            without = reference.subgraph(set(reference) - {candidate})
            if not nx.has_path(without, graph.placeholder, graph.output):
                expected.append(candidate)
    assert list(cut_points(graph)) == expected


def test_following_stops_where_it_is_told_to() -> None:
    graph = graph_of(lambda m, x: (x + 1).tanh().neg().exp())

    def follow(found: Node) -> bool:
        return found.name != "tanh"

    assert {n.name for n in ancestors([node(graph, "exp")], follow)} == {"exp", "neg"}
    assert {n.name for n in descendants([node(graph, "add")], follow)} == {"add"}
    assert {n.name for n in descendants([node(graph, "tanh")], follow)} == {"tanh", "neg", "exp", "output"}


def test_walks_do_not_depend_on_the_depth_of_a_graph() -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3000):
            x = x + 1
        return x

    graph = graph_of(forward)
    assert len(descendants([graph.placeholder])) == len(ancestors([graph.output])) == 3002
    assert len(cut_points(graph)) == 3000


CUTS = [
    ("chain", lambda m, x: (x + 1).tanh(), ["add", "tanh"]),
    ("shortcut", lambda m, x: x + x.tanh().exp(), ["add"]),
    ("shape arithmetic does not go around", lambda m, x: x.tanh().reshape(x.size(0), -1).exp(), ["tanh", "reshape", "exp"]),
    ("a tuple is no cut", lambda m, x: x.tanh().chunk(2, -1)[0], ["tanh", "getitem"]),
    ("parameters alone do not go around", lambda m, x: (x.tanh() * (m.scale + 1)).exp(), ["tanh", "mul", "exp"]),
    ("two outputs", lambda m, x: (x.tanh(), x.exp()), []),
]


@pytest.mark.parametrize(("function", "names"), [c[1:] for c in CUTS], ids=[c[0] for c in CUTS])
def test_cut_points(function: object, names: list[str]) -> None:
    graph = graph_of(function, scale=nn.Parameter(torch.ones(4)))  # type: ignore[arg-type]
    assert [n.name for n in cut_points(graph)] == names


@pytest.mark.parametrize(
    ("names", "back"), [(["add", "exp"], "tanh"), (["add", "tanh", "exp"], None), (["add", "neg"], None), (["x", "mul"], "neg"), ([], None)]
)
def test_where_a_path_comes_back(names: list[str], back: str | None) -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return y.neg() * y.tanh().exp()

    graph = graph_of(forward)
    found = reentry(graph.nodes, [node(graph, n) for n in names])
    assert (found.name if found else None) == back
