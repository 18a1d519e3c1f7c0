"""The backbones that `tools/coverage.py` tries: from libraries, at small sizes, and user-written ones. Weights are random."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from cost_sweep import timm_families, torchvision_models
from oddities import ODDITIES
from torch import Tensor, nn


class Candidate(NamedTuple):
    """A backbone: its name, what builds it, and the shape of one sample (None: the smallest image that it trains on)."""

    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...] | None = None


class OneOutput(nn.Module):
    """A model as a backbone: one part of what it returns, and a linear head where that is a sequence of tokens or a map."""

    def __init__(self, model: nn.Module, part: str, width: int | None = None) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.head = None if width is None else nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)[self.part] if self.part else self.model(x)
        return output if self.head is None else self.head(output)


def candidates() -> Iterator[Candidate]:
    """All backbones, the small and odd ones first."""
    for name, (build, shape) in ODDITIES.items():
        yield Candidate(f"own/{name}", build, shape)
    yield from _hugging_face()
    yield from _features()
    yield from _outside()
    # In turn, so that a run that ends early has some of both.
    for pair in zip_longest(timm_families(), torchvision_models()):
        yield from (Candidate(*made) for made in pair if made is not None)


def _outside() -> Iterator[Candidate]:
    models = torchvision.models
    off = {"weights": None, "weights_backbone": None, "num_classes": 5}
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        yield Candidate(f"segmentation/{name}", partial(models.get_model, name, **off), (3, 64, 64))
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
    model = timm.create_model(name, **arguments)
    model.set_grad_checkpointing(True)
    return model


def _hugging_face() -> Iterator[Candidate]:
    if importlib.util.find_spec("transformers") is None:
        return
    import transformers as hf

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    maps = {"depths": [2, 2], "hidden_sizes": [16, 32], "num_stages": 2}
    classes = {"num_labels": 5}

    def classifier(name: str, **options: Any) -> Candidate:
        make = getattr(hf, f"{name}ForImageClassification")
        config = getattr(hf, f"{name}Config")
        return Candidate(f"huggingface/{name}", lambda: OneOutput(make(config(**options, **classes)), "logits"), (3, 32, 32))

    yield classifier("ViT", **small)
    yield classifier("DeiT", **small)
    yield classifier("Dinov2", **{k: v for k, v in small.items() if k != "intermediate_size"}, mlp_ratio=2)
    yield classifier("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    yield classifier("ConvNext", **maps)
    yield classifier("ResNet", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic")
    yield classifier("RegNet", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], groups_width=16)
    yield classifier("PvtV2", image_size=32, num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[16, 32],
                     patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])  # fmt: skip
    vision = hf.CLIPVisionConfig(**small)
    yield Candidate("huggingface/CLIPVision", lambda: OneOutput(hf.CLIPVisionModel(vision), "pooler_output", 32), (3, 32, 32))
    yield Candidate("huggingface/ViT_checkpointing", lambda: _hf_checkpointing(hf, {**small, **classes}), (3, 32, 32))
    yield Candidate("huggingface/ViT_as_it_is", lambda: hf.ViTForImageClassification(hf.ViTConfig(**small, **classes)), (3, 32, 32))


def _hf_checkpointing(hf: Any, options: dict[str, Any]) -> nn.Module:
    model = hf.ViTForImageClassification(hf.ViTConfig(**options))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return OneOutput(model, "logits")


def left_out() -> list[str]:
    """Libraries whose backbones are missing because they are not installed."""
    return [name for name in ("transformers", "einops") if importlib.util.find_spec(name) is None]


def parameters_of(build: Callable[[], nn.Module]) -> int:
    """How many there are, without memory for them where the constructor allows that."""
    try:
        with torch.device("meta"):
            module = build()
    except Exception:
        module = build()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        return 0
    return sum(p.numel() for p in module.parameters())
