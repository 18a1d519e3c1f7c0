"""Floating-point types by the names that specs use."""

import torch

#: what autocast computes in
AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: what features are cached in
DTYPES = {"float32": torch.float32, **AUTOCAST_DTYPES}


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
