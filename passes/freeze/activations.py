"""Lean activations and pooling: the stock forward, and a backward from a bit per element or a position within the window.

The in-place variants compute out of place: nothing keeps their input alive any more. NaN and infinity behave as in the stock backward.

In eager mode eight bytes of a mask are packed into one with a multiplication (each byte's lowest bit is moved to its own place in the
topmost byte of a 64-bit word), which costs about as much as the activation itself; `tools/freeze_bench.py --masks` prints the ratio. Under
`torch.compile` the mask stays a byte per element, because packing would break the compiler's fusion.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from graphopt.passes.freeze.operators import ShapeOnly, Size, as_tuple, dummy_input, recorded, save_metadata

aten = torch.ops.aten


# Moves the lowest bit of byte i of a little-endian word to bit 56 + i; no two terms of the product meet, so nothing carries.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
#: bit i of byte i, as a signed 64-bit number
_BIT_OF_BYTE = 0x8040201008040201 - (1 << 64)


def save_mask(ctx: Any, mask: Tensor, *more: Tensor) -> None:
    """Saves a fresh boolean mask for the backward of an `autograd.Function`, in the order it lies in memory, and `more` after it."""
    ctx.shape, ctx.channels_last, ctx.packed = mask.shape, False, not torch.compiler.is_compiling()
    if not ctx.packed:
        ctx.save_for_backward(mask, *more)
        return
    if not mask.is_contiguous():
        ctx.channels_last = mask.dim() == 4 and mask.is_contiguous(memory_format=torch.channels_last)
        mask = mask.permute(0, 2, 3, 1) if ctx.channels_last else mask.contiguous()
    ctx.save_for_backward(pack(mask.view(-1)), *more)


def load_mask(ctx: Any) -> Tensor:
    """The mask that `save_mask` saved, in the shape and memory format it had, as bytes: 0 where it was false, anything else where true."""
    saved = ctx.saved_tensors[0]
    if not ctx.packed:
        return saved.view(torch.uint8)
    flat = unpack(saved, ctx.shape.numel())
    if not ctx.channels_last:
        return flat.view(ctx.shape)
    n, c, h, w = ctx.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def pack(mask: Tensor) -> Tensor:
    """(n,) fresh booleans, whose memory is reused -> (ceil(n / 8),) bytes."""
    if mask.numel() % 8:
        mask = F.pad(mask, (0, -mask.numel() % 8))
    return mask.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: Tensor, length: int) -> Tensor:
    """The first `length` bits of a packed mask as bytes, 0 for false and non-zero for true."""
    return packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_BIT_OF_BYTE).view(torch.uint8)[:length]


#: of each activation: its stock function, the mask of an input and its output, and the input's gradient from the mask's bytes
_PIECEWISE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    # From the output: converting to bool is several times faster than comparing the input with 0, and NaN passes in both.
    "relu": (torch.relu, lambda x, y: y.bool(), lambda grad, mask: aten.threshold_backward(grad, mask, 0)),
    "hardtanh": (
        F.hardtanh,
        lambda x, y, low, high: y.ne(low).logical_and_(y.ne(high)),
        lambda grad, mask, low, high: aten.threshold_backward(grad, mask, 0),
    ),
    "leaky_relu": (F.leaky_relu, lambda x, y, slope: x > 0, lambda grad, mask, slope: aten.leaky_relu_backward(grad, mask, slope, False)),
    # Any input inside (-3, 3) has the same slope, any outside none; the kernel's own constant keeps the last bit equal.
    "hardsigmoid": (
        F.hardsigmoid,
        lambda x, y: (x > -3).logical_and_(x < 3),
        lambda grad, mask: aten.hardsigmoid_backward(grad, (mask == 0).to(grad.dtype) * 4),
    ),
}


class _Piecewise(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, kind: Any, *arguments: Any) -> Any:
        function, mask, _ = _PIECEWISE[kind]
        ctx.kind, ctx.arguments = kind, arguments
        y = function(x, *arguments)
        save_mask(ctx, mask(x, y, *arguments))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _PIECEWISE[ctx.kind][2](grad, load_mask(ctx), *ctx.arguments), *(None,) * (1 + len(ctx.arguments))


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`; saves a bit per element."""
    return _Piecewise.apply(input, "relu") if recorded(input) else F.relu(input)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`F.hardtanh`; saves a bit per element."""
    return _Piecewise.apply(input, "hardtanh", min_val, max_val) if recorded(input) else F.hardtanh(input, min_val, max_val)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu6`; saves a bit per element."""
    return hardtanh(input, 0.0, 6.0)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`F.leaky_relu`; saves a bit per element."""
    return _Piecewise.apply(input, "leaky_relu", negative_slope) if recorded(input) else F.leaky_relu(input, negative_slope)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`; saves a bit per element."""
    return _Piecewise.apply(input, "hardsigmoid") if recorded(input) else F.hardsigmoid(input)


class _Prelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        save_mask(ctx, x > 0, weight)
        return F.prelu(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        slopes = ctx.saved_tensors[1].to(grad.dtype)
        slopes = slopes.view(-1, *(1,) * (grad.dim() - 2)) if slopes.numel() > 1 else slopes.view(())
        return torch.where(load_mask(ctx) != 0, grad, grad * slopes), None


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu` with a frozen slope, one or one per channel of (N, C, ...); saves a bit per element."""
    return _Prelu.apply(input, weight) if recorded(input, weight) else F.prelu(input, weight)


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: Any) -> Any:
        save_metadata(ctx, x)
        ctx.arguments = (kernel, stride, padding, dilation, ceil)
        y, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        reach = (kernel[0] - 1) * dilation[0] * x.shape[3] + (kernel[1] - 1) * dilation[1]
        small = torch.uint8 if reach < 1 << 8 else torch.int16 if reach < 1 << 15 else torch.int32
        ctx.save_for_backward((indices - _corners(ctx.shape, indices, stride, padding)).to(small))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (positions,) = ctx.saved_tensors
        _, stride, padding, *_ = ctx.arguments
        indices = positions + _corners(ctx.shape, positions, stride, padding)
        return aten.max_pool2d_with_indices_backward(grad, dummy_input(ctx, grad), *ctx.arguments, indices), *(None,) * 5


def _corners(shape: torch.Size, windows: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Index in the (H * W) plane of each window's first element, (OH, OW); it may lie in the padding."""
    rows = torch.arange(windows.shape[2], device=windows.device) * stride[0] - padding[0]
    columns = torch.arange(windows.shape[3], device=windows.device) * stride[1] - padding[1]
    return rows[:, None] * shape[3] + columns


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`F.max_pool2d` on (N, C, H, W); saves each maximum's place within its window."""
    if input.dim() != 4 or return_indices or not recorded(input):
        stock: Callable[..., Tensor] = F.max_pool2d
        return stock(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    sizes = (kernel_size, stride or kernel_size, padding, dilation)
    return _MaxPool2d.apply(input, *(as_tuple(s, 2) for s in sizes), ceil_mode)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`F.avg_pool2d` on (N, C, H, W); saves the input's shape."""
    if input.dim() != 4 or not recorded(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    sizes = (as_tuple(s, 2) for s in (kernel_size, stride or kernel_size, padding))
    return ShapeOnly.apply(input, "avg_pool2d", *sizes, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """`F.adaptive_avg_pool2d` on (N, C, H, W); saves the input's shape."""
    if input.dim() != 4 or not recorded(input):
        return F.adaptive_avg_pool2d(input, output_size)  # type: ignore[arg-type]
    wanted = (output_size,) * 2 if output_size is None or isinstance(output_size, int) else output_size
    size = tuple(have if want is None else want for want, have in zip(wanted, input.shape[2:], strict=True))
    # To a single value it is a mean, which saves nothing in stock PyTorch either.
    return F.adaptive_avg_pool2d(input, size) if size == (1, 1) else ShapeOnly.apply(input, "_adaptive_avg_pool2d", size)
