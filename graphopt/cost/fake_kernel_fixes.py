"""Corrections where a fake kernel of torch gives a result another layout or type than the real one does.

Layout matters for memory: a non-contiguous result is copied by the next operator. Each entry was found by `tools/cost_sweep.py`, which
compares strides and types of every operator's result on fake and on real CPU tensors, and has no effect once torch is fixed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten


def _layer_norm_backward(_args: tuple[Any, ...], out: Any) -> Any:
    return (out[0].contiguous(), *out[1:])


def _batch_norm(args: tuple[Any, ...], out: Any) -> Any:
    parameters = [t for t in args[1:5] if isinstance(t, torch.Tensor)]
    if any(t.dtype == torch.float32 != args[0].dtype for t in parameters):
        return (out[0], *(t.float() for t in out[1:]))
    return out


_FIXES: dict[Any, Callable[[tuple[Any, ...], Any], Any]] = {
    # The kernel works on a contiguous copy of its input, and its gradient has that layout; the fake one keeps the input's strides.
    aten.native_layer_norm_backward: _layer_norm_backward,
    # A half-precision input with float32 parameters: the statistics are saved in float32, not in the input's type.
    aten.native_batch_norm: _batch_norm,
}


def fixed(packet: Any, args: tuple[Any, ...], out: Any) -> Any:
    """`out` with the layout and types that the real kernel of `packet` (an `OpOverloadPacket`) gives it."""
    fix = _FIXES.get(packet)
    return fix(args, out) if fix and isinstance(out[0], FakeTensor) else out
