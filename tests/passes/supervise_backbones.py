"""Small backbones of every family that local supervision divides: how to make one, and the shape of one sample."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torchvision
from torch import nn


def _vgg() -> nn.Module:
    """VGG-11 with an eighth of the channels."""
    layers: list[str | int] = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    model = torchvision.models.VGG(torchvision.models.vgg.make_layers(layers, batch_norm=True), num_classes=10, init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(64, 10))
    return model


BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    "vgg11_bn": (_vgg, (3, 32, 32)),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_heads=3, num_classes=10),
        (3, 32, 32),
    ),
    "swin, timm": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=28, embed_dim=24, depths=(1, 1, 1), num_heads=(1, 2, 4), num_classes=10
        ),
        (3, 28, 28),
    ),
    "swin, torchvision": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1, 2], [1, 2, 4], [7, 7], num_classes=10, stochastic_depth_prob=0.1),
        (3, 32, 32),
    ),
    "convnext": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=10), (3, 32, 32)),
    "mobilenet": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), (3, 32, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10), (3, 32, 32)),
    "mixer": (lambda: timm.models.MlpMixer(10, img_size=64, patch_size=32, num_blocks=4, embed_dim=64), (3, 64, 64)),
    "pvt": (lambda: timm.create_model("pvt_v2_b0", num_classes=10, depths=(1, 1, 1, 1)), (3, 64, 64)),
}
