"""Which backbones there are, by source and name, and the input that each takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.errors import BackboneError, did_you_mean
from graphopt.models import cifar_resnet as cifar

SOURCES = ("torchvision", "timm", "cifar", "python")


def names(source: str) -> list[str]:
    """The backbones a source has; none for `python`."""
    if source == "timm":
        import timm

        return timm.list_models()
    if source == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    return cifar.names() if source == "cifar" else []


def default_input(source: str, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """One sample's shape by the library's own word; None for an unknown model and for python code."""
    if source == "cifar":
        return (int(arguments.get("in_chans", 3)), 32, 32)
    if source == "timm":
        import timm

        if not is_hosted(name) and timm.is_model(name):
            config = timm.models.get_pretrained_cfg(name)
            channels, height, width = config.input_size if config else (3, 224, 224)
            size = arguments.get("img_size", (height, width))
            height, width = (size, size) if isinstance(size, int) else size
            return (int(arguments.get("in_chans", channels)), int(height), int(width))
    if source == "torchvision":
        import torchvision

        if name in torchvision.models.list_models():
            # Every image model takes 224 but the two that its documentation names; the video models say a clip's shape.
            side = 299 if name == "inception_v3" else 224
            if name in torchvision.models.list_models(torchvision.models.video):
                return (3, 16, side, side)
            return (3, side, side)
    return None


def is_hosted(name: str) -> bool:
    """`hf-hub:...` and its like: timm would go to the network, or to a folder, for the model's own configuration."""
    return ":" in name or "/" in name


def unknown(source: str, name: str) -> BackboneError:
    """The error for a name that `source` does not have: the nearest names, or the source that has it."""
    if source == "timm" and is_hosted(name):
        fix: str | None = 'Use timm\'s own name, and weights = "file"'
        return BackboneError(f"{name!r} would be fetched", where="backbone, name", fix=fix)
    fix = did_you_mean(name, names(source))
    elsewhere = [other for other in ("torchvision", "timm", "cifar") if other != source and name in names(other)]
    if elsewhere:
        fix = f"{elsewhere[0]} has one: source = {elsewhere[0]!r}".replace("'", '"')
    return BackboneError(f"{source} has no model {name!r}", where="backbone, name", fix=fix)
