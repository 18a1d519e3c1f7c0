"""Backbones to drop parts of: how to build them, their input, and a part that ends at a cut point."""

from __future__ import annotations

import timm
import torchvision
from torch import nn

from graphopt.models import cifar_resnet as cifar
from tests.support.backbones import Small


class Vgg(nn.Module):
    """A plain chain of conv-norm-act units, some with a pool, before a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


BACKBONES = {
    "small": (lambda: Small(), (3, 8, 8), "blocks.1"),
    "resnet20": (lambda: cifar.build("resnet20"), (3, 16, 16), "layer2"),
    "bottlenecks": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], 10, width_per_group=16),
        (3, 32, 32),
        "layer2",
    ),
    "vgg": (lambda: Vgg(), (3, 32, 32), "features.4-7"),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10), (3, 32, 32), "features.transition1"),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10), (3, 32, 32), "blocks.1"),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10
        ),
        (3, 64, 64),
        "layers.0",
    ),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=10), (3, 32, 32), "stages.1"),
    "efficientnet": (lambda: timm.create_model("mobilenetv2_035", num_classes=10), (3, 32, 32), "blocks.3"),
}
