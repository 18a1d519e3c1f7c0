"""Lean operators: the stock forward, bit for bit, with a backward that computes only the input's gradient and saves only what that takes.

They stand where a region is frozen but something before it trains. Each falls back to the stock operator when a weight does require a
gradient after all, or when nothing is being recorded, so a lean operator is never wrong, at worst not lean.

| operator | stock saves | lean saves |
|---|---|---|
| convolution | input, weight | weight |
| linear under autocast | the weight's low-precision copy | weight |
| norm with running statistics | input, statistics, weight | statistics, weight |
| layer and group norm under autocast on CUDA | the input's float32 copy | the input as it came |
| ReLU, ReLU6, hardtanh, leaky ReLU, PReLU, hardsigmoid | input or output | a bit per element |
| max pooling | input, 64-bit indices | the position within the window, 1 to 4 bytes per output |
| average pooling, reflection and replication padding | input | its shape |

Linear layers in full precision, smooth activations (GELU, SiLU, hardswish, mish), softmax, attention and multiplication by a frozen scale
already save no more than their input gradient needs: they stay stock.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten
_CONV, _CONV_TRANSPOSE = (F.conv1d, F.conv2d, F.conv3d), (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
Size = int | list[int] | tuple[int, ...]
Bias = Tensor | None


def recorded(x: Tensor, *frozen: Tensor | None) -> bool:
    """Whether a lean backward is of use: the input's gradient is wanted, and no other's."""
    return torch.is_grad_enabled() and x.requires_grad and not any(t is not None and t.requires_grad for t in frozen)


def as_tuple(value: Size, n: int) -> tuple[int, ...]:
    """One size per dimension, from one size for all `n` of them or from a sequence."""
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)


def save_metadata(ctx: Any, x: Tensor) -> None:
    """Notes an input's shape, dtype and memory format without keeping the input."""
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.format = torch.contiguous_format
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            ctx.format = layout


def dummy_input(ctx: Any, like: Tensor) -> Tensor:
    """A tensor that a backward kernel asks the input's shape and layout of. It is never read, and gone when the kernel returns.

    Allocated, not expanded from one element: kernels bring their input into their layout first, and would copy an expanded one.
    """
    return torch.empty(ctx.shape, dtype=like.dtype, device=like.device, memory_format=ctx.format)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, *arguments: Any) -> Any:
        ctx.save_for_backward(weight)
        save_metadata(ctx, x)
        ctx.arguments = stride, padding, dilation, transposed, output_padding, groups = arguments
        if transposed:
            return _CONV_TRANSPOSE[weight.dim() - 3](x, weight, bias, stride, padding, output_padding, groups, dilation)
        return _CONV[weight.dim() - 3](x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        weight = ctx.saved_tensors[0].to(grad.dtype)
        found, _, _ = aten.convolution_backward(grad, dummy_input(ctx, grad), weight, None, *ctx.arguments, (True, False, False))
        return found.to(ctx.dtype), *(None,) * 8


def conv(
    input: Tensor, weight: Tensor, bias: Bias = None, stride: Size = 1, padding: str | Size = 0, dilation: Size = 1, groups: int = 1
) -> Tensor:
    """`F.conv1d`, `F.conv2d` or `F.conv3d`, by the weight's shape; saves the weight and not the input (N, C, *spatial)."""
    n = weight.dim() - 2
    if input.dim() != weight.dim() or not recorded(input, weight, bias):
        return _CONV[n - 1](input, weight, bias, stride, padding, dilation, groups)
    stride, dilation = as_tuple(stride, n), as_tuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple(t // 2 for t in total)
        # The odd element goes behind, as the stock operator has it; zero padding saves nothing.
        if any(t % 2 for t in total):
            input = F.pad(input, [end for t in reversed(total) for end in (0, t % 2)])
    padding = as_tuple(0 if isinstance(padding, str) else padding, n)
    return _Convolution.apply(input, weight, bias, stride, padding, dilation, False, (0,) * n, groups)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """`F.conv_transpose1d` to `3d`, by the weight's shape; saves the weight and not the input (N, C, *spatial)."""
    n = weight.dim() - 2
    if input.dim() != weight.dim() or not recorded(input, weight, bias):
        return _CONV_TRANSPOSE[n - 1](input, weight, bias, stride, padding, output_padding, groups, dilation)
    stride, padding, dilation, output_padding = (as_tuple(s, n) for s in (stride, padding, dilation, output_padding))
    return _Convolution.apply(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


class ShapeOnly(Function):
    """`aten.<name>(x, *arguments)` for a kernel whose backward asks for the input's shape and layout, and not for its values."""

    @staticmethod
    def forward(ctx: Any, x: Any, name: Any, *arguments: Any) -> Any:
        save_metadata(ctx, x)
        ctx.name, ctx.arguments = name, arguments
        return getattr(aten, name)(x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        # Its backward reads the size off the gradient.
        arguments = ctx.arguments if ctx.name != "_adaptive_avg_pool2d" else ()
        found = getattr(aten, f"{ctx.name}_backward")(grad, dummy_input(ctx, grad), *arguments)
        return found, None, *(None for _ in ctx.arguments)


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """`F.pad`; reflection and replication save the input's shape only."""
    pad = list(pad)
    kind = {"reflect": "reflection", "replicate": "replication"}.get(mode)
    if kind is None or input.dim() != len(pad) // 2 + 2 or not recorded(input):
        return F.pad(input, pad, mode, value)
    return ShapeOnly.apply(input, f"{kind}_pad{len(pad) // 2}d", pad)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on (..., in) features. Stock saves only the frozen weight, but under autocast a fresh copy of it at every call."""
    if not (recorded(input, weight, bias) and torch.is_autocast_enabled(input.device.type)):
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _RunningNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, mean: Any, variance: Any, weight: Any, bias: Any, eps: Any, instance: Any) -> Any:
        ctx.save_for_backward(mean, variance, weight)
        ctx.eps, ctx.dtype = eps, x.dtype
        return (F.instance_norm if instance else F.batch_norm)(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        mean, variance, weight = ctx.saved_tensors
        # With fixed statistics the kernel only scales the gradient: it asks for an input, and does not look at its values.
        arguments = (weight, mean, variance, None, None, False, ctx.eps, (True, False, False))
        found, _, _ = aten.native_batch_norm_backward(grad, grad.detach(), *arguments)
        return found.to(ctx.dtype), *(None,) * 6


def batch_norm(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Tensor:
    """`F.batch_norm` with eval semantics, whatever `training` says: (N, C, ...) normalised by the running statistics, which stay put."""
    if not recorded(input, weight, bias):
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)
    return _RunningNorm.apply(input, mean, variance, weight, bias, eps, False)


def instance_norm(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, batch: bool, momentum: float, eps: float
) -> Tensor:
    """`F.instance_norm` with eval semantics, whatever `batch` (`use_input_stats`) says: by the running statistics, which stay put."""
    if not recorded(input, weight, bias):
        return F.instance_norm(input, mean, variance, weight, bias, False, 0.0, eps)
    return _RunningNorm.apply(input, mean, variance, weight, bias, eps, True)


def _widened(x: Tensor) -> bool:
    """Whether autocast would make, and stock would save, a float32 copy of the input: on CUDA only, the CPU's kernels mix precisions."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type)


class WidenedLayerNorm(Function):
    """Computes in float32 like autocast on CUDA, saves the input in its own precision."""

    @staticmethod
    def forward(ctx: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
        out, mean, scale = torch.native_layer_norm(x.float(), shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        ctx.normalized = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, mean, scale, weight, bias = ctx.saved_tensors
        arguments = (ctx.normalized, mean, scale, weight, bias, (True, False, False))
        found, _, _ = aten.native_layer_norm_backward(grad, x.float(), *arguments)
        return found.to(x.dtype), None, None, None, None


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm` on (..., *normalized_shape); keeps a low-precision input as it is where autocast computes in float32."""
    if not (recorded(input, weight, bias) and _widened(input)):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return WidenedLayerNorm.apply(input, list(normalized_shape), weight, bias, eps)


class WidenedGroupNorm(Function):
    """Computes in float32 like autocast on CUDA, saves the input in its own precision."""

    @staticmethod
    def forward(ctx: Any, x: Any, groups: Any, weight: Any, bias: Any, eps: Any) -> Any:
        ctx.arguments = (x.shape[0], x.shape[1], x.shape[2:].numel(), groups)
        save_metadata(ctx, x)
        # The kernels of other devices know one layout.
        ctx.format = ctx.format if x.device.type == "cpu" else torch.contiguous_format
        wide = x.float().contiguous(memory_format=ctx.format)
        out, mean, scale = aten.native_group_norm(wide, weight, bias, *ctx.arguments, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, mean, scale, weight = ctx.saved_tensors
        grad, wide = (t.contiguous(memory_format=ctx.format) for t in (grad, x.float()))
        found, _, _ = aten.native_group_norm_backward(grad, wide, mean, scale, weight, *ctx.arguments, (True, False, False))
        return found.to(x.dtype), None, None, None, None


def group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`F.group_norm` on (N, C, ...); keeps a low-precision input as it is where autocast computes in float32."""
    if not (recorded(input, weight, bias) and _widened(input)):
        return F.group_norm(input, num_groups, weight, bias, eps)
    return WidenedGroupNorm.apply(input, num_groups, weight, bias, eps)
