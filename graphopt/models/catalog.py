"""The backbones there are, by source and name, and the input that each takes. Imports no library to say so (see `index`)."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.errors import BackboneError, did_you_mean
from graphopt.models.index import Preparation, index

SOURCES = ("torchvision", "timm", "cifar", "python")

#: depths of CIFAR ResNets that were published, and CIFAR VGGs; any depth 6n+2 works
CIFAR_DEPTHS = (20, 32, 44, 56, 110)
CIFAR_VGGS = ("vgg11", "vgg13", "vgg16", "vgg19")
_IMAGENET = Preparation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875, ())


def names(source: str) -> Sequence[str]:
    """Names of the backbones that a source has; none for `python`."""
    if source in ("timm", "torchvision"):
        return index(source).names
    return [*(f"resnet{depth}" for depth in CIFAR_DEPTHS), *CIFAR_VGGS] if source == "cifar" else []


def having(name: str) -> list[str]:
    """The sources that have a backbone of this name."""
    return [source for source in SOURCES if name in names(source)]


def default_input(source: str, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Default input shape of one sample, according to the library; None for `python`, whose code has not run."""
    check_name(source, name)
    if source == "cifar":
        return (_size(arguments.get("in_chans"), 3), 32, 32)
    if source == "timm":
        channels, height, width = index("timm").inputs.get(name) or _registered_input(name)
        size = arguments.get("img_size")
        sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        return (_size(arguments.get("in_chans"), channels), _size(sides[0], height), _size(sides[1], width))
    return tuple(index("torchvision").inputs.get(name, (3, 224, 224))) if source == "torchvision" else None


def _size(given: Any, default: int) -> int:
    """A size that an argument gives; the default where it gives none, or one that the constructor will refuse."""
    return given if type(given) is int and given > 0 else default


def _registered_input(name: str) -> Sequence[int]:
    config = sys.modules["timm"].models.get_pretrained_cfg(name)
    return config.input_size if config else (3, 224, 224)


def check_name(source: str, name: str) -> None:
    """Refuses a name that `source` does not have, with the nearest names, or the source that has it."""
    if source == "timm" and (":" in name or "/" in name):  # timm would look for `hf-hub:...` and the like on the network or in a folder
        message = f"{name!r} would be downloaded; graphopt never downloads"
        raise BackboneError(message, where="backbone, name", fix='Use timm\'s own name, and weights = "file"')
    if not _known(source, name):
        other = next(iter(having(name)), None)
        fix = f'{other} has one: source = "{other}"' if other else did_you_mean(name, names(source))
        raise BackboneError(f"{source} has no model {name!r}", where="backbone, name", fix=fix)


def _known(source: str, name: str) -> bool:
    if source == "cifar":
        return name in CIFAR_VGGS or re.fullmatch(r"resnet\d+", name) is not None
    return source == "python" or name in index(source).inputs or _registered(source, name)


def _registered(library: str, name: str) -> bool:
    """Whether this process has added a model of that name to a library; no index has it."""
    if library == "timm" and library in sys.modules:
        return bool(sys.modules[library].is_model(name))
    return library in sys.modules and name in sys.modules[library].models.list_models()


def preparation(name: str) -> Preparation:
    """How the weights that timm publishes for a backbone expect images; for one without any, as most of ImageNet's do."""
    known = index("timm")
    return known.preparations[known.prepared[name]] if name in known.prepared else _IMAGENET
