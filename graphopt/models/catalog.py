"""The backbones there are, by source and name, and the input that each takes."""

import re
from collections.abc import Mapping
from typing import Any

from graphopt.errors import BackboneError, did_you_mean
from graphopt.models import cifar_resnet as cifar

SOURCES = ("torchvision", "timm", "cifar", "python")


def names(source: str) -> list[str]:
    """Names of the backbones that a source has; none for `python`."""
    if source == "timm":
        import timm

        return timm.list_models()
    if source == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    return cifar.names() if source == "cifar" else []


def default_input(source: str, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Default input shape of one sample, according to the library; None for `python`, whose code has not run."""
    check_name(source, name)
    if source == "cifar":
        return (_size(arguments.get("in_chans"), 3), 32, 32)
    if source == "timm":
        import timm

        config = timm.models.get_pretrained_cfg(name)
        channels, height, width = config.input_size if config else (3, 224, 224)
        size = arguments.get("img_size")
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        return (_size(arguments.get("in_chans"), channels), _size(sides[0], height), _size(sides[1], width))
    if source == "torchvision":
        from torchvision import models

        # Image models take 224 pixels, except for the one that the documentation names; video models take clips of 16 frames.
        side = 299 if name == "inception_v3" else 224
        return (3, 16, side, side) if name in models.list_models(models.video) else (3, side, side)
    return None


def _size(given: Any, default: int) -> int:
    """A size that an argument gives; the default where it gives none, or one that the constructor will refuse."""
    return given if type(given) is int and given > 0 else default


def check_name(source: str, name: str) -> None:
    """Refuses a name that `source` does not have, with the nearest names, or the source that has it."""
    if source == "timm":
        import timm

        if ":" in name or "/" in name:  # timm would look for `hf-hub:...` and the like on the network or in a folder
            message = f"{name!r} would be downloaded; graphopt never downloads"
            raise BackboneError(message, where="backbone, name", fix='Use timm\'s own name, and weights = "file"')
        known = timm.is_model(name)
    else:
        any_depth = source == "cifar" and re.fullmatch(r"resnet\d+", name)
        known = bool(source == "python" or any_depth or name in names(source))
    if not known:
        other = next((other for other in SOURCES if other != source and name in names(other)), None)
        fix = f'{other} has one: source = "{other}"' if other else did_you_mean(name, names(source))
        raise BackboneError(f"{source} has no model {name!r}", where="backbone, name", fix=fix)
