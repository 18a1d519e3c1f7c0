"""Bytes of tensors, and hashes."""

import hashlib
from collections.abc import Mapping
from typing import Any

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


def content_digest(value: Any) -> str:
    """32 hex digits for nested dicts, lists and tuples of tensors and plain values: every bit, dtype, shape, name and order counts."""
    digest = hashlib.blake2b(digest_size=16)
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            digest.update(raw_bytes(value.cpu()))
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)};".encode())
            pending.extend(part for pair in value.items() for part in pair)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)};".encode())
            pending.extend(value)
        else:
            text = repr(value).encode()
            digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
    return digest.hexdigest()
