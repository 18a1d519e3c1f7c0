"""Copies with other tensors: everything is covered, and what was shared is shared again."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphopt.ir.copying import fake_copy
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
