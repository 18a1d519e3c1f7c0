"""Auxiliary heads: a module's output becomes class scores, or features to contrast.

`pool` is mean over the positions, norm, linear; `norm-pool` puts the norm first, over every position, as the transformer papers do (arXiv
2212.14215). `conv` is InfoPro's (ICLR 2021), "1c2f": a 3x3 convolution with norm and ReLU, global pooling, two linear layers with a ReLU
between. The default is `pool`: a head runs in every module and every step, and must not cost what the module saves.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.supervise.layout import ActivationLayout

#: width of the hidden layer of InfoPro's head, and of the features it contrasts
HIDDEN = 128
#: most positions per side that the convolution gives; it takes every k-th row and column of a larger map. InfoPro's largest.
LARGEST_SIDE = 16
HeadKind = Literal["pool", "norm-pool", "conv", "contrast"]


class PoolHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): mean over positions and layer norm over channels, in either order, then linear."""

    def __init__(self, layout: ActivationLayout, outputs: int, norm_first: bool, hidden: int | None = None) -> None:
        super().__init__()
        self.layout, self.norm_first = layout, norm_first
        self.norm = nn.LayerNorm(layout.channels)
        self.fc = _mlp(layout.channels, hidden, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """(N, outputs)."""
        if self.norm_first:
            return self.fc(self.norm(self.layout.tokens(h)).mean(1))
        # The mean of half-precision activations is float32, which weights in half precision do not take.
        return self.fc(self.norm(self.layout.mean(h).to(self.norm.weight.dtype)))


class ConvHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): InfoPro's head, its width and stride those of its ResNets with 16, 32 and 64 channels.

    Up to 32 channels the convolution doubles them at stride 2; from 64 on it has as many, at most 128, at stride 1 where the map is small.
    It takes every k-th row and column of a map that would still have more than `LARGEST_SIDE` positions per side.
    """

    def __init__(self, layout: ActivationLayout, outputs: int) -> None:
        super().__init__()
        assert layout.grid is not None
        self.layout = layout
        side = max(layout.grid)
        stride = 1 if layout.channels >= 64 and side <= LARGEST_SIDE else 2
        self.step = max(1, -(-side // (LARGEST_SIDE * stride)))
        width = 2 * layout.channels if layout.channels < 64 else min(layout.channels, HIDDEN)
        self.conv = nn.Conv2d(layout.channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = _mlp(width, HIDDEN, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """(N, outputs)."""
        h = self.layout.map(h)
        if self.step > 1:
            h = h[:, :, :: self.step, :: self.step]
        return self.fc(F.relu(self.bn(self.conv(h))).mean((2, 3)))


def _mlp(inputs: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build(kind: HeadKind, layout: ActivationLayout, classes: int) -> nn.Module:
    """The head of that kind. `"contrast"` ends in 128 features, on the convolutional trunk for maps with channels first."""
    if kind == "conv" or (kind == "contrast" and layout.images):
        return ConvHead(layout, HIDDEN if kind == "contrast" else classes)
    if kind == "contrast":
        return PoolHead(layout, HIDDEN, norm_first=False, hidden=HIDDEN)
    return PoolHead(layout, classes, norm_first=kind == "norm-pool")
