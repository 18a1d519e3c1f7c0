"""The memory format of images and of what convolves them."""

import torch
from torch import Tensor, nn


def channels_last(tensor: Tensor) -> Tensor:
    """A tensor (N, C, H, W), an image batch or a convolution's weight, with its channels innermost in memory; others as they are.

    A parameter's values stay a leaf parameter. Where nothing changes, the tensor itself is returned.
    """
    if tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    values = tensor.detach().contiguous(memory_format=torch.channels_last)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values.requires_grad_(tensor.requires_grad)
