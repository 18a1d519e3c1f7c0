"""Auxiliary heads: a module's output becomes class scores, or features to contrast.

`pool` is the head of the transformer papers (arXiv 2212.14215): norm, mean over positions, linear. `conv` is InfoPro's (ICLR 2021), its
configuration "1c2f": a 3x3 convolution with norm and ReLU, global pooling, two linear layers with a ReLU between.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.supervise.layout import Layout

#: width of the hidden layer of InfoPro's head, and of the features it contrasts
HIDDEN = 128
#: positions per side that the conv head's convolution gives at most; a larger map is average-pooled before
LARGEST_SIDE = 16

Trunk = Literal["pool", "conv"]


def natural(layout: Layout) -> Trunk:
    """The head a layout calls for: convolutional for maps with channels first, pooled for everything else."""
    return "conv" if layout.images else "pool"


class PoolHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): layer norm over the channels of each position, mean over positions, linear.

    For maps with channels first the mean comes before the norm, where a norm per position would have to copy the whole map.
    """

    def __init__(self, layout: Layout, outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.LayerNorm(layout.channels)
        self.fc = _mlp(layout.channels, hidden, outputs)

    def forward(self, h: Tensor) -> Tensor:
        if self.layout.images:
            return self.fc(self.norm(h.mean((2, 3))))
        return self.fc(self.norm(self.layout.tokens(h)).mean(1))


class ConvHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): InfoPro's head, its width and stride carried over from its ResNets' 16, 32 and 64 channels.

    Up to 32 channels the convolution doubles them at stride 2; from 64 on it keeps them, at most 128. Maps that would still be larger than
    16 x 16 after it are average-pooled first, so that the head costs next to nothing on a 224-pixel backbone's early maps.
    """

    def __init__(self, layout: Layout, outputs: int) -> None:
        super().__init__()
        assert layout.grid is not None
        self.layout = layout
        stride = 1 if layout.channels >= 64 and max(layout.grid) <= LARGEST_SIDE else 2
        self.shrink = max(1, -(-max(layout.grid) // (LARGEST_SIDE * stride)))
        width = 2 * layout.channels if layout.channels < 64 else min(layout.channels, HIDDEN)
        self.conv = nn.Conv2d(layout.channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = _mlp(width, HIDDEN, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = self.layout.map(h)
        if self.shrink > 1:
            h = F.avg_pool2d(h, self.shrink, ceil_mode=True)
        return self.fc(F.relu(self.bn(self.conv(h))).mean((2, 3)))


def _mlp(inputs: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build(kind: Literal["pool", "conv", "contrast"] | None, layout: Layout, classes: int) -> nn.Module:
    """The head of that kind (None: the natural one). `"contrast"` is the natural trunk with 128 features at its end."""
    trunk = natural(layout) if kind in (None, "contrast") else kind
    outputs = HIDDEN if kind == "contrast" else classes
    if trunk == "conv":
        return ConvHead(layout, outputs)
    return PoolHead(layout, outputs, HIDDEN if kind == "contrast" else None)
