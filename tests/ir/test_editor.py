"""What the editor does to a graph, what it records, and that sections nest whatever is outlined."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from graphopt import Editor, Graph, Section
from graphopt.compiler.emit import emit
from graphopt.ir.flow import ancestors, descendants, is_convex
from graphopt.ir.section import Author
from graphopt.runtime.body import Body, NoGrad
from tests.support.graphs import dags, graph_of, node

AUTHOR = Author(3, "test")


class Plain(nn.Module):
    """Runs a section as it is."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = Body(body)

    def forward(self, *inputs: Any) -> Any:
        return self.body(*inputs)


class Local(Plain):
    """Runs a section with a local loss of zero."""

    def forward(self, target: Any, *inputs: Any) -> Any:
        return self.body(*inputs), torch.zeros(()) if self.training else None


@pytest.fixture
def graph() -> Graph:
    return graph_of(lambda m, x: m.act(m.fc(x + 1) * m.scale), fc=nn.Linear(4, 4), act=nn.ReLU(), scale=nn.Parameter(torch.ones(4)))


@pytest.fixture
def edit(graph: Graph) -> Editor:
    return Editor(graph, AUTHOR)


def run(graph: Graph) -> Tensor:
    graph.refresh()
    return graph.module.eval()(torch.ones(2, 4))


X = torch.full((2, 4), 2.0)


def after_fc(graph: Graph) -> Tensor:
    return graph.module.get_submodule("fc")(X)


# -- new nodes --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", [torch.neg, "neg"], ids=["function", "method"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_call_is_stamped_recorded_and_has_a_shape(edit: Editor, target: Any, side: str) -> None:
    mul = node(edit.graph, "mul")
    place = {"after": mul} if side == "after" else {"before": node(edit.graph, "act")}
    made = edit.call(target, (mul,), like=node(edit.graph, "fc"), **place)
    edit.redirect(mul, made)
    assert made.meta["origin"] == node(edit.graph, "fc").meta["origin"]
    assert made.meta["pass"] == 3
    assert made.meta["val"].shape == (2, 4)
    assert edit.graph.order[made] == edit.graph.order[mul] + 1
    assert made.args == (mul,)
    assert list(edit.edits.inserted) == [made.name]
    assert list(edit.edits.redirected) == ["act"]
    assert torch.equal(run(edit.graph), F.relu(-after_fc(edit.graph)))


@pytest.mark.parametrize("places", [{}, {"before": 1, "after": 1}], ids=["none", "both"])
def test_a_new_node_needs_one_position(edit: Editor, places: dict[str, Any]) -> None:
    mul = node(edit.graph, "mul")
    with pytest.raises(ValueError, match="one of before and after"):
        edit.call(torch.neg, (mul,), **dict.fromkeys(places, mul))


def test_a_new_node_has_the_origin_and_the_sections_of_the_node_next_to_it(edit: Editor) -> None:
    fc = node(edit.graph, "fc")
    edit.outline([fc], Plain, "part")
    made = edit.call(torch.neg, (fc,), after=fc)
    assert made.meta["origin"].path == "fc"
    assert [n.name for n in edit.graph.sections[0].nodes] == ["fc", "neg"]


def test_a_new_leaf(edit: Editor) -> None:
    mul = node(edit.graph, "mul")
    made = edit.call_module("added.norm", nn.BatchNorm1d(4), (mul,), after=mul)
    edit.redirect(mul, made)
    assert list(edit.edits.added) == ["added.norm"]
    assert "added.norm.weight" in edit.graph.module.state_dict()
    assert made.meta["val"].shape == (2, 4)
    run(edit.graph)
    assert made in edit.graph.nodes


def test_a_new_parameter_is_read(edit: Editor) -> None:
    edit.add_parameter("new.part.offset", nn.Parameter(torch.full((4,), 5.0)))
    act = node(edit.graph, "act")
    offset = edit.read("new.part.offset", before=act)
    total = edit.call(torch.add, (node(edit.graph, "mul"), offset), before=act)
    edit.redirect(node(edit.graph, "mul"), total, [act])
    assert offset.meta["val"].shape == (4,)
    assert offset.meta["pass"] == 3
    assert list(edit.edits.added) == ["new.part.offset"]
    assert torch.equal(run(edit.graph), F.relu(after_fc(edit.graph) + 5))


# -- changed nodes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "target", "args", "op", "expected"),
    [
        ("mul", torch.sub, None, "call_function", lambda y: F.relu(y - 1)),
        ("mul", "sub", None, "call_method", lambda y: F.relu(y - 1)),
        ("mul", None, ("fc", 3), "call_function", lambda y: F.relu(y * 3)),
        ("act", torch.neg, None, "call_function", lambda y: -y),
        ("act", "spare", None, "call_module", lambda y: torch.tanh(y)),
    ],
    ids=["function", "method", "arguments", "a leaf becomes a function", "another leaf"],
)
def test_another_call(edit: Editor, name: str, target: Any, args: Any, op: str, expected: Callable[[Tensor], Tensor]) -> None:
    edit.add_module("spare", nn.Tanh())
    changed = node(edit.graph, name)
    edit.set_call(changed, target, args and tuple(node(edit.graph, a) if isinstance(a, str) else a for a in args))
    assert changed.op == op
    assert changed.meta["pass"] == 3
    assert list(edit.edits.changed) == [name]
    assert torch.equal(run(edit.graph), expected(after_fc(edit.graph)))


def test_a_method_becomes_a_function_and_back() -> None:
    graph = graph_of(lambda m, x: x.neg())
    edit, neg = Editor(graph, AUTHOR), node(graph, "neg")
    edit.set_call(neg, torch.exp)
    assert (neg.op, neg.target) == ("call_function", torch.exp)
    edit.set_call(neg, "add", kwargs={"other": 2})
    assert (neg.op, neg.target) == ("call_method", "add")
    assert torch.equal(run(graph), torch.full((2, 4), 3.0))


@pytest.mark.parametrize("new", ["node", "constant"])
def test_redirect(edit: Editor, new: str) -> None:
    fc, act = node(edit.graph, "fc"), node(edit.graph, "act")
    edit.redirect(node(edit.graph, "mul"), fc if new == "node" else 0.5)
    assert act.args == ((fc,) if new == "node" else (0.5,))
    assert list(edit.edits.redirected) == ["act"]
    assert "pass" not in act.meta  # its own operation is the backbone's


def test_redirect_some_users_and_never_the_new_node_itself() -> None:
    graph = graph_of(lambda m, x: (x.neg(), x.exp()))
    edit = Editor(graph, AUTHOR)
    twice = edit.call(torch.mul, (graph.placeholder, 2), after=graph.placeholder)
    edit.redirect(graph.placeholder, twice, [node(graph, "exp"), graph.output])
    assert twice.args[0] is graph.placeholder
    assert node(graph, "neg").args == (graph.placeholder,)
    assert node(graph, "exp").args == (twice,)
    edit.redirect(graph.placeholder, twice)
    assert twice.args[0] is graph.placeholder
    assert list(edit.edits.redirected) == ["exp", "neg"]


def test_erase_takes_nodes_out_of_sections(edit: Editor) -> None:
    fc, mul, scale = (node(edit.graph, name) for name in ("fc", "mul", "scale"))
    edit.outline([fc, mul], Plain, "both")
    edit.outline([mul], Plain, "one")
    edit.redirect(mul, fc)
    edit.erase([scale, mul])
    assert [(s.name, s.nodes) for s in edit.graph.sections] == [("both", (fc,))]
    assert list(edit.edits.erased) == ["mul", "scale"]
    assert torch.equal(run(edit.graph), F.relu(after_fc(edit.graph)))


def test_what_is_still_read_is_not_erased(edit: Editor) -> None:
    with pytest.raises(RuntimeError, match="still had 1 users"):
        edit.erase([node(edit.graph, "fc")])


def test_a_leaf_is_replaced_for_all_its_calls() -> None:
    graph = graph_of(lambda m, x: m.act(m.act(x) - 3), act=nn.ReLU())
    edit = Editor(graph, AUTHOR)
    graph.module.get_submodule("act").training = False
    first = node(graph, "act")
    edit.replace_leaf(first, nn.Tanh())
    assert list(edit.edits.replaced) == ["act"]
    assert set(edit.edits.changed) == {"act", "act_1"}
    assert all(n.meta["pass"] == 3 for n in edit.calls("act"))
    assert not graph.module.get_submodule("act").training
    assert torch.equal(run(graph), torch.tanh(torch.tanh(torch.ones(2, 4)) - 3))


# -- modules and parameters -------------------------------------------------------------------------------------------------
def test_remove(edit: Editor) -> None:
    fc = edit.graph.module.get_submodule("fc")
    fc.register_buffer("table", torch.zeros(1), persistent=False)
    edit.remove(["fc.table", "fc.bias", "act", "fc.nothing", "gone.weight"])
    assert list(edit.edits.removed) == ["fc.table", "fc.bias", "act"]
    assert set(edit.graph.module.state_dict()) == {"scale", "fc.weight"}
    assert fc._non_persistent_buffers_set == set()


def test_freeze(edit: Editor) -> None:
    edit.freeze(["fc.weight", "scale"])
    assert list(edit.edits.frozen) == ["fc.weight", "scale"]
    assert {name for name, p in edit.graph.module.named_parameters() if p.requires_grad} == {"fc.bias"}


def test_analyses_are_forgotten_after_every_edit(edit: Editor) -> None:
    graph = edit.graph
    fc, act = node(graph, "fc"), node(graph, "act")
    edits: list[Callable[[], object]] = [
        lambda: edit.call(torch.neg, (fc,), after=fc),
        lambda: edit.set_call(act, torch.neg),
        lambda: edit.redirect(fc, node(graph, "neg")),
        lambda: edit.erase([edit.call(torch.neg, (fc,), after=fc)]),
        lambda: edit.freeze(["scale"]),
        lambda: edit.remove(["act"]),
    ]

    def analysis(analysed: Graph) -> object:
        return object()

    for do in edits:
        before = graph.cached(analysis)
        assert graph.cached(analysis) is before
        do()
        assert graph.cached(analysis) is not before


# -- sections ---------------------------------------------------------------------------------------------------------------
def chain() -> tuple[Editor, tuple[Node, ...]]:
    """Six operations, one after the other."""
    graph = graph_of(lambda m, x: (x + 1).neg().exp().tanh().sin().cos())
    return Editor(graph, AUTHOR), graph.nodes[1:-1]


def ranges(edit: Editor, nodes: tuple[Node, ...]) -> dict[str, tuple[int, int]]:
    """First and last operation of each section."""
    return {s.name: (nodes.index(min(s.nodes)), nodes.index(max(s.nodes))) for s in edit.graph.sections}


#: (what is outlined in turn: first and last operation, with a loss or not; the sections there are then)
OUTLINED: list[tuple[str, list[tuple[int, int, bool]], dict[str, tuple[int, int]]]] = [
    ("one", [(1, 3, False)], {"s": (1, 3)}),
    ("disjoint", [(0, 1, False), (2, 3, False)], {"s": (0, 1), "s_2": (2, 3)}),
    ("the inner one later", [(0, 4, False), (1, 2, False)], {"s": (0, 4), "s_2": (1, 2)}),
    ("the outer one later", [(1, 2, False), (0, 4, False)], {"s": (1, 2), "s_2": (0, 4)}),
    ("the same nodes twice", [(1, 2, False), (1, 2, False)], {"s": (1, 2), "s_2": (1, 2)}),
    ("overlap", [(0, 2, False), (1, 4, False)], {"s": (0, 2), "s_2": (1, 2), "s_3": (3, 4)}),
    ("inside one with a loss", [(0, 4, True), (1, 2, False)], {"s": (0, 4), "s_2": (1, 2)}),
    ("around one with a loss", [(2, 3, True), (0, 5, False)], {"s": (2, 3), "s_2": (0, 1), "s_3": (2, 3), "s_4": (4, 5)}),
    ("a loss inside", [(0, 5, False), (2, 3, True)], {"s": (0, 1), "s_2": (2, 3), "s_3": (4, 5), "s_4": (2, 3)}),
    ("a loss around", [(2, 3, False), (0, 5, True)], {"s": (2, 3), "s_2": (0, 5)}),
    ("a loss over the border", [(0, 3, False), (2, 5, True)], {"s": (0, 1), "s_2": (2, 3), "s_3": (2, 5)}),
    ("names of pieces are free", [(0, 2, False), (1, 5, False), (4, 4, True)],
     {"s": (0, 2), "s_2": (1, 2), "s_3": (3, 3), "s_3_2": (4, 4), "s_3_3": (5, 5), "s_4": (4, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "expected"), [c[1:] for c in OUTLINED], ids=[c[0] for c in OUTLINED])
def test_sections_nest(sections: list[tuple[int, int, bool]], expected: dict[str, tuple[int, int]]) -> None:
    edit, nodes = chain()
    for first, last, loss in sections:
        edit.outline(nodes[first : last + 1], Local if loss else Plain, "s", target=loss)
    assert ranges(edit, nodes) == expected
    assert edit.edits.sections.keys() == expected.keys()
    assert all(s.author == AUTHOR for s in edit.graph.sections)


def test_what_runs_in_a_section_of_some_kind_is_left_out() -> None:
    edit, nodes = chain()
    edit.outline(nodes[1:3], NoGrad, "frozen")
    edit.outline(nodes, Plain, "s", outside=NoGrad)
    assert ranges(edit, nodes) == {"frozen": (1, 2), "s": (0, 0), "s_2": (3, 5)}
    edit.remove_sections(lambda s: s.wrap is NoGrad)
    assert ranges(edit, nodes) == {"s": (0, 0), "s_2": (3, 5)}


def test_only_some_pieces_are_worth_a_section() -> None:
    edit, nodes = chain()
    edit.outline(nodes[1:3], Local, "local", target=True)
    edit.outline(nodes, Plain, "s", only=lambda piece: len(piece) > 1)
    assert ranges(edit, nodes) == {"local": (1, 2), "s": (1, 2), "s_2": (3, 5)}


def test_nothing_is_outlined_where_nothing_is_left() -> None:
    edit, nodes = chain()
    edit.outline(nodes, NoGrad, "frozen")
    assert edit.outline(nodes[1:3], Plain, "s", outside=NoGrad) == ()
    graph = graph_of(lambda m, x: x * m.scale, scale=nn.Parameter(torch.ones(4)))
    assert Editor(graph, AUTHOR).outline([node(graph, "scale")], Plain, "s") == ()


def computing(section: Section) -> set[Node]:
    """Reading a parameter does not count: emission does that outside of all sections."""
    return {n for n in section.nodes if n.op != "get_attr"}


def check_sections(graph: Graph) -> None:
    """What holds whatever was outlined."""
    names = [s.name for s in graph.sections]
    assert len(set(names)) == len(names)
    assert all(is_convex(graph, s.nodes) for s in graph.sections)
    for one, other in itertools.permutations(graph.sections, 2):
        mine, theirs = computing(one), computing(other)
        assert not mine & theirs or mine <= theirs or theirs <= mine
        assert not (one.target and not other.target and mine and mine < theirs)


def outline_any(graph: Graph, data: st.DataObject, draw_nodes: Callable[[list[Node]], set[Node]]) -> None:
    edit = Editor(graph, AUTHOR)
    candidates = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    with_loss: set[Node] = set()
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = draw_nodes(candidates)
        loss = data.draw(st.booleans()) and not chosen & with_loss
        with_loss |= chosen if loss else set()
        made = edit.outline(chosen, Local if loss else Plain, "s", target=loss)
        assert {n for s in made for n in s.nodes} <= chosen
        assert {n for s in made for n in computing(s)} == {n for n in chosen if n.op != "get_attr"}
        check_sections(graph)


@settings(max_examples=50)
@given(dags(), st.data())
def test_any_convex_sets_nest(graph: Graph, data: st.DataObject) -> None:
    def convex_set(candidates: list[Node]) -> set[Node]:
        seeds = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3))
        return (descendants(seeds) & ancestors(seeds)) - {graph.placeholder, graph.output}

    outline_any(graph, data, convex_set)


@settings(max_examples=50)
@given(dags(), st.data())
def test_any_runs_of_nodes_nest_and_compute_the_same(graph: Graph, data: st.DataObject) -> None:
    def nodes_in_a_row(candidates: list[Node]) -> set[Node]:
        first, last = sorted(data.draw(st.integers(0, len(candidates) - 1)) for _ in range(2))
        return set(candidates[first : last + 1])

    outline_any(graph, data, nodes_in_a_row)
    x = torch.rand(3, 4)
    assert torch.equal(emit(graph).eval()(x), graph.module.eval()(x))
