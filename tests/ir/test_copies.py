"""Copies with other tensors: everything is covered, and what was shared is shared again."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphopt.ir.copying import copy_with, fake_copy, real_copy
from graphopt.ir.shapes import tensors_in
from graphopt.runtime.body import NoGrad, bodies


class Holder(nn.Module):
    """Holds tensors in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.tied = self.fc.weight
        self.plain = torch.ones(3)
        self.listed = [self.plain, torch.zeros(2)]
        inner = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
        self.section = NoGrad(fx.symbolic_trace(nn.Sequential(nn.ReLU())))
        self.section.body.module.nested = NoGrad(inner)


def test_every_tensor_is_replaced_and_sharing_stays() -> None:
    module = Holder().to(torch.float64)
    module.fc.weight.requires_grad_(False)
    copied = fake_copy(module, FakeTensorMode())
    (_, outer), (_, inner) = bodies(copied)
    tensors = [*copied.state_dict().values(), copied.plain, *copied.listed, *inner.parameters()]
    assert outer is copied.section.body.module
    assert all(isinstance(t.data if isinstance(t, nn.Parameter) else t, FakeTensor) for t in tensors)
    assert copied.tied is copied.fc.weight
    assert copied.listed[0] is copied.plain
    assert [p.requires_grad for p in copied.fc.parameters()] == [False, True]
    assert copied.fc.weight.dtype == torch.float64


def test_the_module_is_left_alone() -> None:
    module = Holder()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fake_copy(module, FakeTensorMode())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not isinstance(module.plain, FakeTensor)


def test_tensors_are_found_in_nested_containers() -> None:
    class Output(OrderedDict):  # type: ignore[type-arg]
        pass

    a, b, c = torch.zeros(3).unbind()
    assert [t is u for t, u in zip(tensors_in(Output(x=(a, [b]), y=3, z={"w": c})), (a, b, c), strict=True)] == [True] * 3
    assert tensors_in(None) == []


class Views(nn.Module):
    """Two buffers in one memory, and values of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(4)
        self.register_buffer("whole", whole)
        self.register_buffer("front", whole[:2], persistent=False)
        self.names, self.owner, self.scale = {"a", "b"}, {self: "itself"}, nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.front.add_(1)
        return x * self.scale + self.whole


def test_a_real_copy_runs_without_a_trace() -> None:
    module = Views()
    copied = real_copy(module, torch.float32)
    copied(torch.ones(4)).sum().backward()
    assert copied.whole.tolist() == [1, 1, 0, 0]
    assert module.whole.tolist() == [0, 0, 0, 0]
    assert module.scale.grad is None
    assert copied.scale.data_ptr() == module.scale.data_ptr()
    assert list(copied.state_dict()) == ["scale", "whole"]
    assert real_copy(module, torch.float64)(torch.ones(4, dtype=torch.float64)).dtype == torch.float64


def test_a_copy_holds_nothing_of_what_was_copied() -> None:
    module = Views()
    copied = copy_with(module)
    assert copied.names == module.names
    assert copied.names is not module.names
    assert list(copied.owner) == [copied]
    copied.scale.data.zero_()
    assert module.scale.tolist() == [1, 1, 1, 1]


def test_a_copy_of_a_graph_module_runs_and_can_be_instrumented_alone() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    copied = copy_with(module)
    x = torch.rand(2, 4)
    assert torch.equal(copied(x), module(x))
    copied.forward = lambda x: -x
    assert torch.equal(copied(x), -x)
    assert not torch.equal(module(x), -x)
    assert copied.get_submodule("0") is not module.get_submodule("0")
