"""FLOPs of one operator call: 2 per multiply-accumulate, as the published tables of torchvision and timm count (twice their MACs).

Only contractions count: matrix products, convolutions, attention. Norms, activations and other element-wise work are
bound by memory traffic and are left out, as in `torch.utils.flop_counter`. The formulas are our own for two reasons: torch's
weight gradient of a grouped convolution is too large by the number of groups, and its registry differs between versions.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class OperatorFlops(NamedTuple):
    """FLOPs of one call. `weight` is the part known to be a weight gradient (a convolution's backward computes both gradients)."""

    plain: int
    weight: int = 0


#: those whose FLOPs are not of matrix products
CONVOLUTIONS = frozenset(
    {
        aten.convolution,
        aten._convolution,
        aten.convolution_overrideable,
        aten.cudnn_convolution,
        aten.miopen_convolution,
        aten._slow_conv2d_forward,
        aten._conv_depthwise2d,
        aten.convolution_backward,
        aten.convolution_backward_overrideable,
    }
)
#: from a call's positional arguments and its result
Formula = Callable[[tuple[Any, ...], Any], OperatorFlops]


def _matrix_product(first: int) -> Formula:
    """The product of arguments `first` and `first + 1`."""
    return lambda args, _out: OperatorFlops(2 * prod(args[first].shape) * args[first + 1].shape[-1])


def _vector_product(first: int) -> Formula:
    return lambda args, _out: OperatorFlops(2 * prod(args[first].shape))


def _convolve(positions: tuple[int, ...], weight: tuple[int, ...]) -> int:
    # `positions` is the shape of the tensor whose every position meets the whole filter once: the output, or a transposed convolution's
    # input. A weight is (out, in / groups, ...) or, transposed, (in, out / groups, ...): the group count is already divided out.
    return 2 * positions[0] * prod(positions[2:]) * prod(weight)


def _convolution(args: tuple[Any, ...], out: Any) -> OperatorFlops:
    transposed = len(args) > 6 and args[6]
    return OperatorFlops(_convolve((args[0] if transposed else out).shape, args[1].shape))


def _plain_convolution(args: tuple[Any, ...], out: Any) -> OperatorFlops:
    return OperatorFlops(_convolve(out.shape, args[1].shape))


def _convolution_backward(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
    gradient, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    once = _convolve((x if transposed else gradient).shape, weight.shape)
    return OperatorFlops(once if mask[0] else 0, once if mask[1] else 0)


def _attention(first: int, over_width: int, over_value: int) -> Formula:
    """Products over the query's width and over the value's; argument `first` is the query, then come key and value."""

    def flops(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
        # (N, heads, tokens, width). Masked and causal positions count: the dense kernels compute them.
        query, key, value = args[first : first + 3]
        per_pair = over_width * query.shape[-1] + over_value * value.shape[-1]
        return OperatorFlops(2 * prod(query.shape[:-1]) * key.shape[-2] * per_pair)

    return flops


FORMULAS: dict[Any, Formula] = {
    aten.mm: _matrix_product(0),
    aten.bmm: _matrix_product(0),
    aten.addmm: _matrix_product(1),
    aten._addmm_activation: _matrix_product(1),
    aten.baddbmm: _matrix_product(1),
    aten.mv: _vector_product(0),
    aten.addmv: _vector_product(1),
    aten.dot: _vector_product(0),
    **dict.fromkeys((aten.convolution, aten._convolution, aten.convolution_overrideable), _convolution),
    **dict.fromkeys(
        (aten.cudnn_convolution, aten.miopen_convolution, aten._slow_conv2d_forward, aten._conv_depthwise2d), _plain_convolution
    ),
    aten.convolution_backward: _convolution_backward,
    aten.convolution_backward_overrideable: lambda args, out: _convolution_backward((*args[:3], None, *args[3:]), out),
}
# A backward computes the scores again, and the gradients of scores, value, query and key: five products, three over the query's width.
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable"):
    for _suffix, _formula in (("", _attention(0, 1, 1)), ("_backward", _attention(1, 3, 2))):
        if hasattr(aten, f"_scaled_dot_product_{_name}{_suffix}"):
            FORMULAS[getattr(aten, f"_scaled_dot_product_{_name}{_suffix}")] = _formula


def operator_flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> OperatorFlops | None:
    """FLOPs of one call of `packet` (an `OpOverloadPacket`); None where it is no contraction.

    A custom operator counts by the formula registered with `torch.utils.flop_counter.register_flop_formula`.
    """
    if (formula := FORMULAS.get(packet)) is not None:
        return formula(args, out)
    registered = flop_registry.get(packet)
    return OperatorFlops(int(registered(*args, **kwargs, out_val=out))) if registered is not None else None
