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


#: from a call's positional arguments and its result
Formula = Callable[[tuple[Any, ...], Any], OperatorFlops]


def _matrix_product(first: int) -> Formula:
    """The product of arguments `first` and `first + 1`."""

    def flops(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
        return OperatorFlops(2 * prod(args[first].shape) * args[first + 1].shape[-1])

    return flops


def _vector_product(first: int) -> Formula:
    def flops(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
        return OperatorFlops(2 * prod(args[first].shape))

    return flops


def _convolve(positions: tuple[int, ...], weight: tuple[int, ...]) -> int:
    # `positions` is the shape of the tensor whose every position meets the whole filter once: the output, or a transposed convolution's
    # input. A weight is (out, in / groups, ...) or, transposed, (in, out / groups, ...): the group count is already divided out.
    return 2 * positions[0] * prod(positions[2:]) * prod(weight)


def _convolution(args: tuple[Any, ...], out: Any) -> OperatorFlops:
    transposed = args[6] if len(args) > 6 else False
    return OperatorFlops(_convolve((args[0] if transposed else out).shape, args[1].shape))


def _plain_convolution(args: tuple[Any, ...], out: Any) -> OperatorFlops:
    return OperatorFlops(_convolve(out.shape, args[1].shape))


def _convolution_backward(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
    gradient, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    once = _convolve((x if transposed else gradient).shape, weight.shape)
    return OperatorFlops(once if mask[0] else 0, once if mask[1] else 0)


def _overrideable_convolution_backward(args: tuple[Any, ...], out: Any) -> OperatorFlops:
    return _convolution_backward((*args[:3], None, *args[3:]), out)


def _attention(query: Any, key: Any, value: Any, products: tuple[int, int]) -> OperatorFlops:
    # (N, heads, tokens, width). Masked and causal positions count: the dense kernels compute them.
    queries, width = query.shape[-2:]
    per_pair = products[0] * width + products[1] * value.shape[-1]
    return OperatorFlops(2 * prod(query.shape[:-2]) * queries * key.shape[-2] * per_pair)


def _attention_forward(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
    return _attention(args[0], args[1], args[2], (1, 1))


def _attention_backward(args: tuple[Any, ...], _out: Any) -> OperatorFlops:
    # Scores again, and the gradients of scores, value, query and key: five products, three of them over the query's width.
    return _attention(args[1], args[2], args[3], (3, 2))


FORMULAS: dict[Any, Formula] = {
    aten.mm: _matrix_product(0),
    aten.bmm: _matrix_product(0),
    aten.addmm: _matrix_product(1),
    aten._addmm_activation: _matrix_product(1),
    aten.baddbmm: _matrix_product(1),
    aten.mv: _vector_product(0),
    aten.addmv: _vector_product(1),
    aten.dot: _vector_product(0),
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_overrideable: _convolution,
    aten.cudnn_convolution: _plain_convolution,
    aten.miopen_convolution: _plain_convolution,
    aten._slow_conv2d_forward: _plain_convolution,
    aten._conv_depthwise2d: _plain_convolution,
    aten.convolution_backward: _convolution_backward,
    aten.convolution_backward_overrideable: _overrideable_convolution_backward,
}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable"):
    for _suffix, _formula in (("", _attention_forward), ("_backward", _attention_backward)):
        if hasattr(aten, f"_scaled_dot_product_{_name}{_suffix}"):
            FORMULAS[getattr(aten, f"_scaled_dot_product_{_name}{_suffix}")] = _formula


def operator_flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> OperatorFlops | None:
    """FLOPs of one call of `packet` (an `OpOverloadPacket`); None where it is no contraction.

    A custom operator counts by the formula registered with `torch.utils.flop_counter.register_flop_formula`.
    """
    formula = FORMULAS.get(packet)
    if formula is not None:
        return formula(args, out)
    registered = flop_registry.get(packet)
    return OperatorFlops(int(registered(*args, **kwargs, out_val=out))) if registered is not None else None
