"""Lean activations and pooling: the stock forward, and a backward from a bit per element or a place within the window.

The in-place variants compute out of place: nothing keeps their input alive any more. NaN and infinity behave as in the stock backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from graphopt.passes.freeze.bitmask import load_mask, save_mask
from graphopt.passes.freeze.operators import Sizes, as_tuple, dummy_input, recorded, save_metadata

aten = torch.ops.aten


class _Relu(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        y = x.relu()
        # From the output: converting to bool is several times faster than comparing the input with 0, and NaN passes in both.
        save_mask(ctx, y.bool())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return aten.threshold_backward(grad, load_mask(ctx), 0)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`; saves a bit per element."""
    return _Relu.apply(input) if recorded(input) else F.relu(input)


class _Hardtanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, low: Any, high: Any) -> Any:
        y = F.hardtanh(x, low, high)
        save_mask(ctx, y.ne(low).logical_and_(y.ne(high)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return aten.threshold_backward(grad, load_mask(ctx), 0), None, None


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`F.hardtanh`; saves a bit per element."""
    return _Hardtanh.apply(input, min_val, max_val) if recorded(input) else F.hardtanh(input, min_val, max_val)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu6`; saves a bit per element."""
    return hardtanh(input, 0.0, 6.0)


class _LeakyRelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, slope: Any) -> Any:
        ctx.slope = slope
        save_mask(ctx, x > 0)
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return aten.leaky_relu_backward(grad, load_mask(ctx), ctx.slope, False), None


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`F.leaky_relu`; saves a bit per element."""
    return _LeakyRelu.apply(input, negative_slope) if recorded(input) else F.leaky_relu(input, negative_slope)


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


class _Hardsigmoid(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        save_mask(ctx, (x > -3).logical_and_(x < 3))
        return F.hardsigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        # Any input inside (-3, 3) has the same slope, any outside none; the kernel's own constant keeps the last bit equal.
        return aten.hardsigmoid_backward(grad, (load_mask(ctx) == 0).to(grad.dtype) * 4)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`; saves a bit per element."""
    return _Hardsigmoid.apply(input) if recorded(input) else F.hardsigmoid(input)


# -- pooling ----------------------------------------------------------------------------------------------------------------------


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
        (places,) = ctx.saved_tensors
        kernel, stride, padding, dilation, ceil = ctx.arguments
        indices = places + _corners(ctx.shape, places, stride, padding)
        arguments = (kernel, stride, padding, dilation, ceil, indices)
        return aten.max_pool2d_with_indices_backward(grad, dummy_input(ctx, grad), *arguments), *(None,) * 5


def _corners(shape: torch.Size, windows: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Index in the (H * W) plane of each window's first element, (OH, OW); it may lie in the padding."""
    rows = torch.arange(windows.shape[2], device=windows.device) * stride[0] - padding[0]
    columns = torch.arange(windows.shape[3], device=windows.device) * stride[1] - padding[1]
    return rows[:, None] * shape[3] + columns


def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`F.max_pool2d` on (N, C, H, W); saves each maximum's place within its window."""
    if input.dim() != 4 or return_indices or not recorded(input):
        stock: Callable[..., Tensor] = F.max_pool2d
        return stock(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    sizes = (kernel_size, stride or kernel_size, padding, dilation)
    return _MaxPool2d.apply(input, *(as_tuple(s, 2) for s in sizes), ceil_mode)


class _AvgPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, *arguments: Any) -> Any:
        save_metadata(ctx, x)
        ctx.arguments = arguments
        return aten.avg_pool2d(x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return aten.avg_pool2d_backward(grad, dummy_input(ctx, grad), *ctx.arguments), *(None,) * len(ctx.arguments)


def avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`F.avg_pool2d` on (N, C, H, W); saves the input's shape."""
    if input.dim() != 4 or not recorded(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    sizes = (as_tuple(s, 2) for s in (kernel_size, stride or kernel_size, padding))
    return _AvgPool2d.apply(input, *sizes, ceil_mode, count_include_pad, divisor_override)


class _AdaptiveAvgPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, size: Any) -> Any:
        save_metadata(ctx, x)
        return F.adaptive_avg_pool2d(x, size)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return aten._adaptive_avg_pool2d_backward(grad, dummy_input(ctx, grad)), None


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """`F.adaptive_avg_pool2d` on (N, C, H, W); saves the input's shape."""
    if input.dim() != 4 or not recorded(input):
        return F.adaptive_avg_pool2d(input, output_size)  # type: ignore[arg-type]
    wanted = (output_size,) * 2 if output_size is None or isinstance(output_size, int) else output_size
    size = tuple(have if want is None else want for want, have in zip(wanted, input.shape[2:], strict=True))
    # To a single value it is a mean, which saves nothing in stock PyTorch either.
    return F.adaptive_avg_pool2d(input, size) if size == (1, 1) else _AdaptiveAvgPool2d.apply(input, size)
