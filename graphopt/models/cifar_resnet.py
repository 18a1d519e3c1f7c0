"""The CIFAR residual networks of He et al. (arXiv 1512.03385, section 4.2), which neither torchvision nor timm has, and VGG for CIFAR.

Depth 6n+2: a 3x3 stem, three stages of n basic blocks at widths 16, 32 and 64, global pooling, one linear layer. The shortcut of the
first block of a stage is a 1x1 convolution with a norm (option B of the paper), as in the systems that graphopt reproduces: with 10
classes, depth 110 has 1,730,714 parameters and depth 32 has 466,906.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import BackboneError
from graphopt.models.catalog import CIFAR_DEPTHS, names

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms, and a shortcut: (N, C, H, W) -> (N, width, H/stride, W/stride)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """One residual step."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes); H and W at least 4, 32 in the paper.

    Raises:
        BackboneError: the depth is not 6n+2 with n at least 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise BackboneError(f"a CIFAR ResNet's depth is 6n+2, not {depth}", fix=f"Use one of {CIFAR_DEPTHS}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.fc = nn.Linear(WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(out.mean((2, 3)))


#: channels per convolution, "M" for a 2x2 max pool
LAYERS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class CifarVGG(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes). H and W are 32 or more: five pools halve them.

    The convolutions are those of arXiv 1409.1556, table 1, with norms after them, as papers train it on CIFAR. Its two hidden layers of
    4096 units are left out: at 32 pixels, where the last map is 1x1, they would hold nine tenths of the parameters and do half of the work.

    Args:
        width: factor on every layer's channels; 1.0 is the published network.
    """

    def __init__(self, name: str, num_classes: int = 10, in_chans: int = 3, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_chans
        for entry in LAYERS[name]:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            wide = max(1, round(entry * width))
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.fc(self.features(x).mean((2, 3)))


def constructor(name: str) -> Callable[..., nn.Module]:
    """What makes a CIFAR ResNet (`"resnet110"`) or VGG (`"vgg11"`) from its arguments.

    Raises:
        BackboneError: not a name of these families.
    """
    if name in LAYERS:
        return partial(CifarVGG, name)
    found = re.fullmatch(r"resnet(\d+)", name)
    if found is None:
        raise BackboneError(f"no CIFAR backbone is called {name!r}", fix="There are " + ", ".join(names("cifar")))
    return partial(CifarResNet, int(found[1]))


def build(name: str, **arguments: Any) -> nn.Module:
    """A CIFAR ResNet or VGG. Raises as `constructor`, and where the depth is not 6n+2."""
    return constructor(name)(**arguments)
