"""VGG for small images (arXiv 1409.1556, table 1) as papers train it on CIFAR: norms after the convolutions, one linear layer as head.

The convolutions are those of the original. Its two hidden layers of 4096 units are left out: they are meant for images of 224 pixels. At 32
pixels, where the last map is 1x1, they would hold nine tenths of the parameters and do half of the work.
"""

from torch import Tensor, nn

#: channels per convolution, "M" for a 2x2 max pool
LAYERS: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class CifarVGG(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes). H and W are 32 or more: five pools halve them.

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
