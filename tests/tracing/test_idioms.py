"""Python that looks at the shapes of tensors in forward traces, with the batch free."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from graphopt import TraceError, trace
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from tests.tracing.nets import SHAPE, Net


def assertion(x: Tensor) -> Tensor:
    assert x.shape[-1] % 4 == 0
    return x


def padding(x: Tensor) -> Tensor:
    rest = -x.shape[-2] % 5
    return F.pad(x, (0, 0, 0, rest)) if rest else x


def unpacking(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    if h != w:
        raise ValueError("not square")
    return x.reshape(b, c, h * w).view(b, c, h, w)


def sizes(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, c, h, w)


def loop(x: Tensor) -> Tensor:
    for i in range(x.shape[-1] // 8):
        x = x + i
    return x


def instance(x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    assert not isinstance(x, (list, tuple))
    return x


def chunks(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, 1)
    return torch.cat([*(t for t in x.chunk(3, dim=1) if t.shape[1] == 1)], 1) + a * b * c


def dimensions(x: Tensor) -> Tensor:
    assert x.ndim == x.dim() == len(x.shape) == 4
    assert x.shape[1:].numel() == 3 * 16 * 16
    return x if x.is_floating_point() else x.float()


def types_of_tensors(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()


def made_for_the_batch(x: Tensor) -> Tensor:
    b = x.shape[0]
    return x * torch.ones(b, 1, 1, 1) + torch.zeros(b, *x.shape[1:], dtype=x.dtype) + torch.arange(b)[:, None, None, None]


def devices(x: Tensor) -> Tensor:
    assert not x.is_cuda
    assert not x.is_meta
    assert x.device == torch.device("cpu")
    assert x.device.type not in ("cuda", "meta")
    assert x.get_device() == -1
    assert x.layout == torch.strided
    assert x.is_cpu
    assert x.is_signed()
    return x if x.is_cuda else x + torch.ones(x.shape[1:], device=x.device)


def mathematics(x: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[0] * x.shape[1])


def assignment(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y[:, 1, 2:4] = x[:, 2, 2:4] * 2
    y[..., -1] += 1
    return y


def comparisons_of_the_batch(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = x.flatten(2).repeat(2, 1, 1)
    assert b > 0
    assert y.size() == (2 * b, c, h * w)
    assert x.shape != y.shape
    assert b >= 0
    if y.shape[0] != x.shape[0] * 2:
        raise ValueError("another batch")
    return x if x.shape == (x + 1).shape else x + 1


LOOKS = (
    comparisons_of_the_batch,
    devices,
    made_for_the_batch,
    mathematics,
    assignment,
    types_of_tensors,
    assertion,
    padding,
    unpacking,
    sizes,
    loop,
    instance,
    chunks,
    dimensions,
)


@pytest.mark.parametrize("look", LOOKS, ids=lambda f: f.__name__)
def test_shapes_are_numbers_and_the_batch_stays_free(look: Callable[[Tensor], Tensor]) -> None:
    model = Net(look=look)
    graph = trace(model, SHAPE)
    assert graph.opaque == ()
    for batch in (1, 5):
        x = torch.rand(batch, *SHAPE)
        assert torch.equal(graph.module.eval()(x), model.eval()(x))


def test_answered_comparisons_leave_nothing_in_the_graph() -> None:
    def look(x: Tensor) -> Tensor:
        assert (x.shape[0] * 2) // 2 == x.shape[0]
        return x

    assert [n.op for n in trace(Net(look=look), SHAPE).nodes] == [n.op for n in trace(Net(), SHAPE).nodes]


def more_than_one(x: Tensor) -> Tensor:
    assert x.shape[0] > 1
    return x


def fewer_than_five(x: Tensor) -> Tensor:
    assert -x.shape[0] < 0 or -x.shape[0] > -5
    return x


def one_by_one(x: Tensor) -> Tensor:
    return torch.stack([x[i] for i in range(x.shape[0])])


@pytest.mark.parametrize(
    ("look", "says"), [(more_than_one, "control flow"), (fewer_than_five, "control flow"), (one_by_one, "as a number: int")]
)
def test_a_batch_that_must_be_of_one_size_is_refused(look: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(Net(look=look), SHAPE)


class ByLength(Net):
    """Asks for the length of its input, with or without a function of another file in between."""

    def __init__(self, length: Callable[[Tensor], int] | None = None) -> None:
        super().__init__()
        self.length, self.token = length, torch.nn.Parameter(torch.rand(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        assert len(x[0]) == 3
        return super().forward(x + self.token.expand(self.length(x) if self.length else len(x), -1, -1, -1))


def test_the_length_of_a_batch_is_its_size() -> None:
    model = ByLength()
    graph = trace(model, SHAPE)
    for batch in (1, 5):
        x = torch.rand(batch, *SHAPE)
        assert torch.equal(graph.module.eval()(x), model.eval()(x))
    with pytest.raises(TraceError, match=r"length .* use x.shape\[0\]"):
        trace(ByLength(operator.length_hint), SHAPE)


def test_a_tensor_is_made_where_the_input_lies_and_questions_about_that_leave_nothing() -> None:
    graph = trace(Net(look=devices), SHAPE)
    asked = [node.args[1] for node in graph.nodes if node.target is getattr]
    assert asked == ["device"]
    with torch.device("meta"):
        moved = graph.module.to("meta").eval()(torch.rand(2, *SHAPE))
    assert moved.is_meta


def test_elements_that_an_index_tensor_chooses_are_assigned_to_in_a_module_of_its_own() -> None:
    def look(x: Tensor) -> Tensor:
        y = x.clone()
        y[y > 0.5] = 0
        return y

    with pytest.raises(TraceError, match="an index tensor chooses: use"):
        trace(Net(look=look), SHAPE)

    class Block(torch.nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y[:, 0] = 1
            return y

    model = Net(lambda: Block(8, 8, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = graphopt.compile(model, [Freeze(select="stem"), Checkpoint(select="blocks.*")], input=SHAPE)
    assert plan.graph.opaque == ()
    assert all(torch.equal(value, before[name]) for name, value in plan.export().state_dict().items())


def test_arguments_with_defaults_and_keywords_are_no_inputs() -> None:
    class Optional(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None, *more: Any, scale: float = 2.0, **options: Any) -> Tensor:
            return super().forward(x) * scale if mask is None else super().forward(x * mask)

    model = Optional()
    x = torch.rand(2, *SHAPE)
    assert torch.equal(trace(model, SHAPE).module.eval()(x), model.eval()(x))


def test_two_required_inputs_are_refused() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    with pytest.raises(TraceError, match="takes 2 required inputs"):
        trace(Two(), SHAPE)
