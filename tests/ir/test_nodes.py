"""Facts about single nodes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from graphopt.ir.nodes import activations, leaf, overwriter, parameters_of, parameters_read, storages, trainable, writes_in_place
from graphopt.runtime.by_mode import ByMode, Slot
from tests.support.graphs import graph_of, node

FUNCTIONS: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = [
    # function or method, arguments after the first, keywords, whether it writes
    ("relu_", (), {}, True),
    ("add_", (1,), {}, True),
    ("__setitem__", (0, 1.0), {}, True),
    ("__iadd__", (1,), {}, True),
    ("relu", (), {}, False),
    ("__getitem__", (0,), {}, False),
    ("__add__", (1,), {}, False),
    (torch.relu_, (), {}, True),
    (F.relu_, (), {}, True),
    (F.leaky_relu_, (0.1,), {}, True),
    (F.relu, (True,), {}, True),
    (F.relu, (), {"inplace": True}, True),
    (F.dropout, (0.5, True, True), {}, True),
    (F.hardtanh, (-1.0, 1.0, True), {}, True),
    (torch.Tensor.relu_, (), {}, True),
    (operator.iadd, (1,), {}, True),
    (operator.itruediv, (2,), {}, True),
    (operator.setitem, (0, 1.0), {}, True),
    (torch.add, (1,), {"out": torch.empty(4)}, True),
    (F.relu, (), {}, False),
    (F.relu, (False,), {}, False),
    (F.relu, (), {"inplace": False}, False),
    (F.dropout, (0.5, True), {}, False),
    (F.hardtanh, (-1.0, True), {}, False),  # here True is a bound, not `inplace`
    (torch.add, (1,), {"out": None}, False),
    (torch.add, (1,), {}, False),
    (operator.add, (1,), {}, False),
    (operator.getitem, (0,), {}, False),
]


def called(
    op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **parts: nn.Module
) -> tuple[Any, fx.Node]:
    graph = fx.Graph()
    made = graph.create_node(op, target, (graph.placeholder("x"), *args), kwargs or {})
    graph.output(made)
    return fx.GraphModule(nn.ModuleDict(parts), graph), made


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "writes"), FUNCTIONS, ids=[f"{getattr(c[0], '__name__', c[0])} {c[1]} {list(c[2])}" for c in FUNCTIONS]
)
def test_which_calls_write_in_place(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> None:
    op = "call_method" if isinstance(target, str) else "call_function"
    module, made = called(op, target, args, kwargs)
    assert writes_in_place(module, made) is writes
    # The same call in one of the modes of a switch.
    switched, made = called("call_module", "part", part=ByMode(target, ((Slot(0), *args), kwargs), ((Slot(0),), {})))
    assert writes_in_place(switched, made) is writes


LEAVES = [
    (nn.ReLU(inplace=True), True),
    (nn.Dropout(inplace=True), True),
    (nn.ReLU(), False),
    (nn.Conv2d(3, 4, 1), False),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), False),
]


@pytest.mark.parametrize(("part", "writes"), LEAVES, ids=[str(c[0]).splitlines()[0] for c in LEAVES])
def test_which_leaves_write_in_place(part: nn.Module, writes: bool) -> None:
    assert writes_in_place(*called("call_module", "part", part=part)) is writes


@pytest.mark.parametrize("op", ["placeholder", "get_attr", "output"])
def test_other_nodes_never_write(op: str) -> None:
    graph = graph_of(lambda m, x: x * m.scale, scale=nn.Parameter(torch.ones(4)))
    assert not any(writes_in_place(graph.module, n) for n in graph.nodes if n.op == op)


def test_views_share_memory_and_copies_do_not() -> None:
    graph = graph_of(lambda m, x: (x.view(2, -1), x[0], x.relu_(), x.clone(), x + 1, x.split(1)), 4, 4)
    x = storages(graph.placeholder)
    assert len(x) == 1
    shares = {n.name: bool(storages(n) & x) for n in graph.nodes if n.op not in ("placeholder", "output")}
    assert shares == {"view": True, "getitem": True, "relu_": True, "clone": False, "add": False, "split": True}


OVERWRITTEN: list[tuple[str, Any, str, str | None]] = [
    ("by nobody", lambda m, x: (x + 1).relu(), "add", None),
    ("at once", lambda m, x: (x + 1).relu_(), "add", "relu_"),
    ("but not what comes out", lambda m, x: (x + 1).relu_() * 2, "relu_", None),
    ("by a leaf", lambda m, x: m.act(x + 1), "add", "act"),
    ("through a view", lambda m, x: (x + 1).view(-1, 2).relu_(), "add", "relu_"),
    ("through a view of a view", lambda m, x: (x + 1).view(-1, 2)[0].add_(1), "add", "add_"),
]


@pytest.mark.parametrize(("function", "name", "by"), [c[1:] for c in OVERWRITTEN], ids=[c[0] for c in OVERWRITTEN])
def test_what_overwrites_an_activation(function: Any, name: str, by: str | None) -> None:
    graph = graph_of(function, act=nn.ReLU(inplace=True))
    found = overwriter(graph, node(graph, name))
    assert (found.name if found else None) == by


def test_a_view_is_overwritten_through_what_it_is_a_view_of() -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        part = y[:, :2]
        return part * y.relu_()[:, :2]

    graph = graph_of(forward)
    found = overwriter(graph, node(graph, "getitem"))
    assert found is node(graph, "relu_")


def test_parameters() -> None:
    shared = nn.Linear(4, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    graph = graph_of(
        lambda m, x: m.frozen(m.again(m.first(x) * m.scale)), scale=nn.Parameter(torch.ones(4)), first=shared, again=shared, frozen=frozen
    )
    read = {n.name: [name for name, _ in parameters_read(graph.module, n)] for n in graph.nodes}
    assert read["first"] == ["first.weight", "first.bias"]
    assert read["scale"] == ["scale"]
    assert read["mul"] == read["x"] == read["output"] == []
    assert parameters_of(graph, graph.nodes) == ("first.weight", "first.bias", "scale", "frozen.weight", "frozen.bias")
    assert {n.name for n in graph.nodes if trainable(graph, n)} >= {"first", "scale"}
    assert not trainable(graph, node(graph, "frozen"))
    assert leaf(graph, node(graph, "frozen")) is frozen
    assert leaf(graph, node(graph, "mul")) is None


def test_a_buffer_is_no_parameter() -> None:
    module = nn.Module()
    module.register_buffer("offset", torch.ones(4))
    graph = graph_of(lambda m, x: x + m.part.offset, part=module)
    assert not any(True for n in graph.nodes for _ in parameters_read(graph.module, n))


def test_activations_are_floats_computed_from_the_input() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        size = x.size(0)
        scale = m.scale * 2
        first, second = (x * scale).chunk(2, -1)
        largest = first.argmax(-1)
        return torch.cat([second, first], -1).reshape(size, -1) + largest.unsqueeze(-1)

    graph = graph_of(forward, scale=nn.Parameter(torch.ones(4)))
    active = {n.name for n in activations(graph)}
    assert active == {"x", "mul_1", "chunk", "getitem", "getitem_1", "cat", "reshape", "add"}
