"""Remembered results of operators are those that torch's own mode works out."""

import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphopt.ir.fakes import FakeMode


def described(value):
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.untyped_storage().nbytes())
    return [described(item) for item in value] if isinstance(value, (list, tuple)) else value


CALLS = {
    "product": lambda x, y: torch.mm(x, y),
    "mixed types": lambda x, y: x + y.double(),
    "a number's type": lambda x, y: [x.int() + 1, x.int() + 1.0, x.int() + True],
    "a scalar": lambda x, y: x.sum(),
    "views": lambda x, y: [x[1:], x.t(), x.view(-1)[3:], x.unsqueeze(0), x.expand(2, 4, 4)],
    "a view's copy": lambda x, y: x[1:, ::2].contiguous(),
    "several": lambda x, y: torch.max(x, 0),
    "parts": lambda x, y: x.split(2),
    "nothing at all": lambda x, y: x[:0] * 2,
    "in place": lambda x, y: x.add_(y).mul_(2),
    "for each": lambda x, y: torch._foreach_add(torch._foreach_mul([x, y[0], x.int()], 2.0), [y, x[1], y.int()], alpha=2),
    "for each, in place": lambda x, y: [torch._foreach_addcmul_([x, y[0].clone()], [y, x[1]], [x, x[0]], [1.0, 2.0]), x],
    "none": lambda x, y: torch.ops.aten.convolution_backward(
        *(x.view(1, 1, 4, 4),) * 2, y.view(1, 1, 4, 4)[..., :1, :1], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_remembered_is_what_torch_gives(call):
    with FakeTensorMode():
        expected = described(CALLS[call](torch.empty(4, 4), torch.empty(4, 4)))
    for _ in range(3):
        with FakeMode():
            assert described(CALLS[call](torch.empty(4, 4), torch.empty(4, 4))) == expected


def test_views_and_writes_keep_the_storage():
    for _ in range(2):
        with FakeMode():
            x = torch.empty(4, 4)
            assert x.add_(1) is x
            assert x.t().untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (x * 2).untyped_storage()._cdata != x.untyped_storage()._cdata


def test_the_default_type_and_real_tensors_count():
    with FakeMode():
        assert (torch.ones(3, dtype=torch.int64) / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (torch.ones(3, dtype=torch.int64) / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    real = torch.ones(3)
    with FakeMode():
        assert isinstance(real + torch.ones(3), FakeTensor)


def test_gradients_flow():
    for _ in range(2):
        with FakeMode():
            x = torch.empty(4, 4, requires_grad=True)
            (x.t() @ x).relu().sum().backward()
            assert x.grad.shape == (4, 4)


def test_an_operator_that_does_not_take_its_fakes_is_an_error_and_no_line_on_the_terminal() -> None:
    log, records = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    try:
        with FakeMode() as mode, mode, pytest.raises(RuntimeError, match="same reduction dim"):
            torch.mm(torch.empty(2, 3), torch.empty(4, 5))
    finally:
        log.removeHandler(handler)
    assert not records
    assert not log.disabled
