"""Features in eight bits: per sample and channel, a scale and whole numbers from -127 to 127."""

import torch
from torch import Tensor

from graphopt.runtime.dtypes import DTYPES

#: bytes of a channel's scale
SCALE = 4


def channels(shape: tuple[int, ...]) -> int:
    """How many channels features of one sample have: the first of (C, H, W), the last of (tokens, C); a vector is one."""
    return shape[0] if len(shape) == 3 else shape[-1] if len(shape) == 2 else 1


def stored(shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and the dtype in which features of one sample are stored; in "int8" they are bytes, scales first."""
    if dtype == "int8":
        return (SCALE * channels(shape) + torch.Size(shape).numel(),), torch.uint8
    return shape, DTYPES[dtype]


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one sample's features."""
    row, kind = stored(shape, dtype)
    return torch.Size(row).numel() * kind.itemsize


def pack(features: Tensor) -> Tensor:
    """(N, *shape) to (N, bytes) uint8, by the largest magnitude of each sample and channel."""
    rows = _by_channel(features.float())
    scale = (rows.abs().amax(2, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (rows / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.contiguous().view(len(rows), -1).view(torch.uint8), numbers.reshape(len(rows), -1).view(torch.uint8)], dim=1)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`, to rounding: (N, *shape) float32; an error is at most half a scale."""
    count = channels(shape)
    scale = packed[:, : SCALE * count].contiguous().view(torch.float32)
    numbers = packed[:, SCALE * count :].contiguous().view(torch.int8).view(len(packed), count, -1)
    rows = numbers.float() * scale[:, :, None]
    return rows.transpose(1, 2).reshape(-1, *shape) if len(shape) == 2 else rows.reshape(-1, *shape)


def _by_channel(features: Tensor) -> Tensor:
    """(N, channels, values of each)."""
    if features.ndim == 3:
        return features.transpose(1, 2)
    return features.reshape(len(features), channels(tuple(features.shape[1:])), -1)
