"""One bit per element: what a piecewise linear activation's backward needs of its input.

In eager mode eight mask bytes are packed into one with a multiplication (each byte's lowest bit is moved to its own place in the
topmost byte of a 64-bit word), which costs about as much as the activation itself; `tools/freeze_bench.py --masks` prints the ratio. Under
`torch.compile` the mask stays a byte per element, because packing would break the compiler's fusion.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
