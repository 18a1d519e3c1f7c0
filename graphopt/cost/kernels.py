"""A step on fake CPU tensors that allocates what CUDA's kernels would.

torch picks its kernels by device, and a fake tensor on a CUDA device cannot run backward on a machine without one. So the step stays on the
CPU, and where torch would choose otherwise on CUDA, the other operator is called here:

- dropout: CUDA's fused kernel keeps a mask of one byte per element; the CPU keeps the scaled mask in the input's type.
- attention: flash (16-bit types without a mask) or memory-efficient attention, whose saved tensors have the shapes of these kernels.
- autocast: CUDA runs normalizations, softmax and sums in float32; the CPU does not.
- optimizers: CUDA's default is the for-each form, whose temporary results are as large as all gradients together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
#: widest attention head of the flash kernel; others use the memory-efficient one
_FLASH_HEAD = 256
#: functions that run in float32 under autocast on CUDA (torch's documentation, "CUDA Ops that can autocast to float32")
_NAMES = """
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cosh cosine_embedding_loss cdist
    cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm hinge_embedding_loss kl_div l1_loss layer_norm log
    log10 log_softmax log1p log2 margin_ranking_loss mse_loss multilabel_margin_loss multi_margin_loss nll_loss norm normalize pdist
    poisson_nll_loss pow prod reciprocal rsqrt sinh smooth_l1_loss soft_margin_loss softmax softmin softplus sum renorm tan
    triplet_margin_loss
"""
_FLOAT32 = frozenset(_NAMES.split())


class _AsOnCuda(TorchFunctionMode):
    """Calls what CUDA would run in the place of a few functions."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (_dropout, torch.dropout):
            return dropout(*args, **kwargs)
        if func is _attention:
            return attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in _FLOAT32:
            args, kwargs = tree_map_only(Tensor, _float32, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, a step on the CPU allocates as on CUDA."""
    from torch.optim import optimizer

    choice: Any = optimizer  # its private names are not typed
    devices: Callable[[], list[str]] = choice._get_foreach_kernels_supported_devices
    # Functions that call others by name run without the mode.
    F.dropout, F.scaled_dot_product_attention = dropout, attention
    choice._get_foreach_kernels_supported_devices = lambda: [*devices(), "cpu"]
    choice._foreach_supported_types.append(FakeTensor)
    call = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The engine leaves modes behind, and a checkpoint runs its part again in the backward.
        with nullcontext() if any(isinstance(m, _AsOnCuda) for m in _get_current_function_mode_stack()) else _AsOnCuda():
            return call(module, *args, **kwargs)

    nn.Module.__call__ = called  # type: ignore[method-assign]  # until this context ends
    try:
        with _AsOnCuda():
            yield
    finally:
        F.dropout, F.scaled_dot_product_attention = _dropout, _attention
        choice._get_foreach_kernels_supported_devices = devices
        choice._foreach_supported_types.remove(FakeTensor)
        nn.Module.__call__ = call  # type: ignore[method-assign]  # torch's own again


_dropout, _attention = F.dropout, F.scaled_dot_product_attention


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` by the fused kernel, where CUDA has one."""
    if not training or inplace or not 0 < p < 1 or not input.numel():
        return _dropout(input, p, training, inplace)
    found: Tensor = torch.native_dropout(input, p, True)[0]
    return found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by the kernel that CUDA chooses; by plain operators where none fits."""
    query, key, value = (_autocast(t) for t in (query, key, value))
    mask = None if attn_mask is None or not attn_mask.is_floating_point() else _autocast(attn_mask)
    if enable_gqa or query.ndim != 4 or key.shape[-1] != value.shape[-1]:
        return _attention(
            query, key, value, mask if mask is not None else attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    padded = [F.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value)]
    if attn_mask is None and query.dtype in _HALF and width <= _FLASH_HEAD:
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
    else:
        bias = None if attn_mask is None else _bias(attn_mask if mask is None else mask, query, key)
        saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        out = aten._scaled_dot_product_efficient_attention(*padded, bias, saves, dropout_p, is_causal, scale=scale)[0]
    found: Tensor = out[..., :width]
    return found


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the memory-efficient kernel takes it: added numbers, rows a multiple of 16 apart."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    rest = -mask.shape[-1] % 16
    mask = F.pad(mask, (0, rest))[..., : mask.shape[-1]] if rest else mask
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _autocast(tensor: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor
