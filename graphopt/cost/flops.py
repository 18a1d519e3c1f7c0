"""FLOPs of one operator call: 2 per multiply-accumulate, as the published tables of torchvision and timm count (twice their MACs).

Only contractions count: matrix products, convolutions, attention. Norms, activations and other element-wise work are
bound by memory traffic and are left out, as in `torch.utils.flop_counter`. The formulas are our own for two reasons: torch's
weight gradient of a grouped convolution is too large by the number of groups, and its registry differs between versions.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Work(NamedTuple):
    """FLOPs of a call. `weight` is what the call itself knows to be a weight gradient (a convolution's backward does both)."""

    plain: int
    weight: int = 0


Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], Work]


def _mm(a: Any, b: Any) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


def _products(first: int) -> Formula:
    return lambda args, kwargs, out: Work(_mm(args[first], args[first + 1]))


def _vector(first: int) -> Formula:
    return lambda args, kwargs, out: Work(2 * prod(args[first].shape))


def _convolve(small: tuple[int, ...], weight: tuple[int, ...]) -> int:
    # `small` is the side every position of which meets the whole filter once: the output, or a transposed convolution's input.
    # A weight is (out, in / groups, ...) or, transposed, (in, out / groups, ...): the group count is already divided out.
    return 2 * small[0] * prod(small[2:]) * prod(weight)


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    transposed = args[6] if len(args) > 6 else False
    return Work(_convolve((args[0] if transposed else out).shape, args[1].shape))


def _plain_convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    return Work(_convolve(out.shape, args[1].shape))


def _convolution_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    gradient, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    once = _convolve((x if transposed else gradient).shape, weight.shape)
    return Work(once if mask[0] else 0, once if mask[1] else 0)


def _attention(query: Any, key: Any, value: Any, products: tuple[int, int]) -> int:
    # (N, heads, tokens, width). Masked and causal positions count: the dense kernels compute them.
    queries, width = query.shape[-2:]
    per_pair = products[0] * width + products[1] * value.shape[-1]
    return 2 * prod(query.shape[:-2]) * queries * key.shape[-2] * per_pair


def _attention_forward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    return Work(_attention(args[0], args[1], args[2], (1, 1)))


def _attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    # Scores again, and the gradients of scores, value, query and key: five products, three of them over the query's width.
    return Work(_attention(args[1], args[2], args[3], (3, 2)))


FORMULAS: dict[Any, Formula] = {
    aten.mm: _products(0),
    aten.bmm: _products(0),
    aten.addmm: _products(1),
    aten._addmm_activation: _products(1),
    aten.baddbmm: _products(1),
    aten.mv: _vector(0),
    aten.addmv: _vector(1),
    aten.dot: _vector(0),
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_overrideable: _convolution,
    aten.cudnn_convolution: _plain_convolution,
    aten.miopen_convolution: _plain_convolution,
    aten._slow_conv2d_forward: _plain_convolution,
    aten._conv_depthwise2d: _plain_convolution,
    aten.convolution_backward: _convolution_backward,
    aten.convolution_backward_overrideable: lambda a, k, o: _convolution_backward((*a[:3], None, *a[3:]), k, o),
}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "fused_attention_overrideable"):
    for _suffix, _formula in (("", _attention_forward), ("_backward", _attention_backward)):
        if hasattr(aten, f"_scaled_dot_product_{_name}{_suffix}"):
            FORMULAS[getattr(aten, f"_scaled_dot_product_{_name}{_suffix}")] = _formula


def work(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work | None:
    """FLOPs of one call of `packet` (an `OpOverloadPacket`), or None where it is no contraction.

    An operator of the user's own counts by the formula registered with `torch.utils.flop_counter.register_flop_formula`.
    """
    formula = FORMULAS.get(packet)
    if formula is not None:
        return formula(args, kwargs, out)
    registered = flop_registry.get(packet)
    return Work(int(registered(*args, **kwargs, out_val=out))) if registered is not None else None
