"""The backbones that `tools/coverage.py` tries: from libraries, at small sizes, and user-written ones. Weights are random."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from coverage_huggingface import hugging_face
from oddities import ODDITIES
from torch import nn

from graphopt.cost import forecast
from graphopt.errors import NeedsValuesError
from graphopt.ir.inputs import Input

#: side lengths of square images, of which a backbone gets the smallest that it takes
SIZES = (64, 96, 128, 224, 256, 299, 384)


class Candidate(NamedTuple):
    """A backbone: its name, what builds it, and the shape of one sample, of each input (None: the smallest image that it trains on)."""

    name: str
    build: Callable[..., nn.Module]
    input: Input | None = None


def candidates(folder: Path | None = None) -> Iterator[Candidate]:
    """All backbones, the small and odd ones first. Names of timm's smallest models are stored in `folder`: finding them takes minutes."""
    for name, (build, shape) in ODDITIES.items():
        yield Candidate(f"own/{name}", build, shape)
    yield from (Candidate(*made) for made in hugging_face())
    yield from _features()
    yield from _outside()
    # In turn, so that a run that ends early has some of both.
    pairs = zip_longest(smallest_of_timm(folder), torchvision.models.list_models(module=torchvision.models))
    for ours, theirs in pairs:
        if ours is not None:
            yield Candidate(f"timm/{ours}", partial(timm.create_model, ours))
        if theirs is not None:
            yield Candidate(f"torchvision/{theirs}", partial(torchvision.models.get_model, theirs, weights=None))


def smallest_of_timm(folder: Path | None) -> list[str]:
    """The model with the fewest parameters of each of timm's families (its files)."""
    file = None if folder is None else folder / f"timm-{timm.__version__}.json"
    if file is not None and file.exists():
        return list(json.loads(file.read_text()))
    families = [names for module in timm.list_modules() if (names := timm.list_models(module=module))]
    found = [min(names, key=lambda name: parameters_of(partial(timm.create_model, name))) for names in families]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return found


def fitting(candidate: Candidate) -> tuple[nn.Module, Input]:
    """The backbone, and the smallest square image it trains on. One that is made for one size is made for a smaller one where it can be."""
    module = candidate.build()
    if candidate.input is not None:
        return module, candidate.input
    declared = getattr(module, "default_cfg", {}).get("input_size", (3, 224, 224))
    errors: list[Exception] = []
    for shape in (*((3, size, size) for size in SIZES), declared):
        for argument in (None, "img_size", "image_size"):
            try:
                made = module if argument is None else candidate.build(**{argument: shape[-1]})
                forecast(made, shape, 2, optimizer=None)
            except NeedsValuesError:
                return made, shape
            except Exception as error:
                # A constructor that does not know the argument says nothing about the image.
                errors += [error] if argument is None else []
            else:
                return made, shape
    raise errors[-1]


def _outside() -> Iterator[Candidate]:
    models = torchvision.models
    off = {"weights": None, "weights_backbone": None, "num_classes": 5}
    for name in models.list_models(module=models.segmentation):
        yield Candidate(f"segmentation/{name}", partial(models.get_model, name, **off), (3, 64, 64))
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"):
        yield Candidate(f"detection/{name}", partial(models.get_model, name, **off), (3, 64, 64))
    fpn = models.detection.backbone_utils.resnet_fpn_backbone
    yield Candidate("detection/resnet18_fpn", partial(fpn, backbone_name="resnet18", weights=None, trainable_layers=5), (3, 64, 64))
    mobile = models.detection.backbone_utils.mobilenet_backbone
    yield Candidate("detection/mobilenet_v3_fpn", partial(mobile, backbone_name="mobilenet_v3_small", weights=None, fpn=True), (3, 64, 64))
    swin = {"patch_size": [2, 4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [8, 7, 7], "num_classes": 5}
    yield Candidate("video/swin3d", partial(models.video.SwinTransformer3d, **swin), (3, 4, 64, 64))
    yield Candidate("video/r3d_18", partial(models.get_model, "r3d_18", num_classes=5), (3, 4, 32, 32))


def _features() -> Iterator[Candidate]:
    made: dict[str, tuple[dict[str, Any], int]] = {
        "resnet18": ({}, 64),
        "convnext_atto": ({}, 64),
        "vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, 64),
        "efficientnet_lite0": ({}, 64),
    }
    for name, (arguments, size) in made.items():
        yield Candidate(f"features/{name}", partial(timm.create_model, name, features_only=True, **arguments), (3, size, size))
    for name in ("resnet18", "vit_tiny_patch16_224"):
        arguments, size = made[name]
        yield Candidate(f"headless/{name}", partial(timm.create_model, name, num_classes=0, **arguments), (3, size, size))
        yield Candidate(f"checkpointing/{name}", partial(_checkpointing, name, **arguments), (3, size, size))


def _checkpointing(name: str, **arguments: Any) -> nn.Module:
    model: Any = timm.create_model(name, **arguments)
    model.set_grad_checkpointing(True)
    return model


def not_installed() -> list[str]:
    """Libraries whose backbones are missing because they are not installed."""
    return [name for name in ("transformers", "einops") if importlib.util.find_spec(name) is None]


def parameters_of(build: Callable[..., nn.Module]) -> int:
    """How many there are, without memory for them where the constructor allows that."""
    try:
        with torch.device("meta"):
            module = build()
    except Exception:
        module = build()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        return 0
    return sum(p.numel() for p in module.parameters())
