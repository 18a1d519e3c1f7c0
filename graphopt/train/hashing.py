"""Bytes of tensors, and hashes."""

import hashlib

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor of any dtype, in row-major order."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers


def hash_parts(*parts: bytes) -> str:
    """32 hex digits for a sequence of byte strings; their lengths count too."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
