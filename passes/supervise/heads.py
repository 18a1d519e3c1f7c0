"""Auxiliary heads: a module's output becomes class scores, or features to contrast.

`pool` is the head of the transformer papers (arXiv 2212.14215): norm, mean over positions, linear. `conv` is InfoPro's (ICLR 2021), its
configuration "1c2f": a 3x3 convolution with norm and ReLU, global pooling, two linear layers with a ReLU between. `conv-light` is the same,
narrower and on every second row and column of a large map: at about a third of the cost, it is the default where channels come first.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.supervise.layout import Layout

#: width of the hidden layer of InfoPro's head, and of the features it contrasts
HIDDEN = 128
#: positions per side that the convolution gives at most; of a larger map it sees each k-th row and column. InfoPro's largest is 16.
#: Indexed by whether the head is light.
LARGEST_SIDE = (16, 8)

Trunk = Literal["pool", "conv", "conv-light"]
Kind = Literal["pool", "conv", "conv-light", "contrast"]


def natural(layout: Layout) -> Trunk:
    """The head a layout calls for: convolutional for maps with channels first, pooled for everything else."""
    return "conv-light" if layout.images else "pool"


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

    Up to 32 channels the convolution doubles them at stride 2; from 64 on it keeps them, at most 128, at stride 1 where the map is small.
    The light one keeps the channels, from 32 to 128, always at stride 2. Of a map that would still have more than `LARGEST_SIDE` positions
    per side, it sees every k-th row and column, so that it costs next to nothing on a 224-pixel backbone's early maps.
    """

    def __init__(self, layout: Layout, outputs: int, light: bool) -> None:
        super().__init__()
        assert layout.grid is not None
        self.layout = layout
        side, largest = max(layout.grid), LARGEST_SIDE[light]
        stride = 1 if not light and layout.channels >= 64 and side <= largest else 2
        self.step = max(1, -(-side // (largest * stride)))
        width = min(layout.channels, HIDDEN)
        width = max(width, 32) if light else 2 * layout.channels if layout.channels < 64 else width
        self.conv = nn.Conv2d(layout.channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = _mlp(width, HIDDEN, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = self.layout.map(h)
        if self.step > 1:
            h = h[:, :, :: self.step, :: self.step]
        return self.fc(F.relu(self.bn(self.conv(h))).mean((2, 3)))


def _mlp(inputs: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build(kind: Kind | None, layout: Layout, classes: int) -> nn.Module:
    """The head of that kind (None: the natural one). `"contrast"` ends in 128 features, on InfoPro's trunk or on the pooled one."""
    trunk = natural(layout) if kind is None else ("conv" if layout.images else "pool") if kind == "contrast" else kind
    outputs = HIDDEN if kind == "contrast" else classes
    if trunk != "pool":
        return ConvHead(layout, outputs, trunk == "conv-light")
    return PoolHead(layout, outputs, HIDDEN if kind == "contrast" else None)
