"""Vision models of Hugging Face's `transformers`, tiny ones made from a config, for `tools/coverage.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
WITHOUT_INTERMEDIATE = {k: v for k, v in TRANSFORMER.items() if k != "intermediate_size"}
PATCHES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2]}
SWIN = {**PATCHES, "patch_size": 2, "num_heads": [2, 2], "window_size": 4}
STAGES = {"depths": [2, 2], "hidden_sizes": [16, 32]}
PYRAMID = {"num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
           "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}  # fmt: skip
LEVIT = {"image_size": 64, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]}
MASKED = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
DENSE = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16, "is_hybrid": False}
MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}

#: options of a config, and the side of an image, per class of models
CLASSIFIERS: dict[str, tuple[dict[str, Any], int]] = {
    "ViT": (TRANSFORMER, 32),
    "ViTMSN": (TRANSFORMER, 32),
    "DeiT": (TRANSFORMER, 32),
    "Beit": (TRANSFORMER, 32),
    "Data2VecVision": (TRANSFORMER, 32),
    "IJepa": (TRANSFORMER, 32),
    "Dinov2": ({**WITHOUT_INTERMEDIATE, "mlp_ratio": 2}, 32),
    "Dinov2WithRegisters": ({**WITHOUT_INTERMEDIATE, "mlp_ratio": 2}, 32),
    "Hiera": ({"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}, 64),
    "Swin": (SWIN, 32),
    "Swinv2": (SWIN, 32),
    "FocalNet": ({**PATCHES, "focal_levels": [2, 2], "focal_windows": [3, 3]}, 32),
    "ConvNext": ({**STAGES, "num_stages": 2}, 32),
    "ConvNextV2": ({**STAGES, "num_stages": 2}, 32),
    "ResNet": ({"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}, 32),
    "RegNet": ({"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16}, 32),
    "Bit": ({"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 8}, 32),
    "Pvt": ({**PYRAMID, "image_size": 32, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}, 32),
    "PvtV2": ({**PYRAMID, "image_size": 32}, 32),
    "Segformer": ({**PYRAMID, "decoder_hidden_size": 16}, 32),
    "PoolFormer": ({**STAGES, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]}, 32),
    "MobileViT": ({**MOBILEVIT, "num_attention_heads": 2}, 64),
    "MobileViTV2": ({"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [16, 24, 32]}, 64),
    "MobileNetV1": ({"depth_multiplier": 0.25, "image_size": 64}, 64),
    "MobileNetV2": ({"depth_multiplier": 0.25, "image_size": 64}, 64),
    "EfficientNet": ({"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}, 64),
    "Levit": ({**LEVIT, "num_attention_heads": [1, 2, 3], "key_dim": [8, 8, 8]}, 64),
    "Cvt": ({"embed_dim": [16, 32, 64], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 64),
    "SwiftFormer": ({"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 48]}, 64),
    "TextNet": ({"image_size": [64, 64]}, 64),
    "HGNetV2": ({}, 64),
}

#: models as they are: blocks that nothing reads, hooks that collect states, noise in eval mode, a token of its own kind
OTHERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("DPT", "ForDepthEstimation", DENSE),
    ("ViTMAE", "Model", MASKED),
    ("Yolos", "ForObjectDetection", {"image_size": [32, 32], "num_detection_tokens": 4}),
)


class OneOutput(nn.Module):
    """A model as a backbone: one part of what it returns, and a linear head where that is a sequence of tokens or a map."""

    def __init__(self, model: nn.Module, part: str, width: int | None = None) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.head = None if width is None else nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)[self.part]
        return output if self.head is None else self.head(output)


class Made(NamedTuple):
    """A backbone, as `coverage_backbones.Candidate` has it."""

    name: str
    build: Any
    input: tuple[int, ...]


def hugging_face() -> Iterator[Made]:
    """Tiny models, wrapped so that they return class scores, and some as they are."""
    if importlib.util.find_spec("transformers") is None:
        return
    square = (3, 32, 32)
    for name, (options, side) in CLASSIFIERS.items():
        make = partial(_build, f"{name}ForImageClassification", f"{name}Config", options, "logits")
        yield Made(f"huggingface/{name}", make, (3, side, side))
    for name in ("CLIP", "Siglip", "MLCD", "Aimv2"):
        make = partial(_build, f"{name}VisionModel", f"{name}VisionConfig", TRANSFORMER, "pooler_output", 32)
        yield Made(f"huggingface/{name}Vision", make, square)
    for name, options, side in (("Segformer", {**PYRAMID, "decoder_hidden_size": 16}, 32), ("MobileViT", MOBILEVIT, 64)):
        make = partial(_build, f"{name}ForSemanticSegmentation", f"{name}Config", options, None)
        yield Made(f"huggingface/{name}_segmentation", make, (3, side, side))
    for name, options in (("DINOv3ViT", TRANSFORMER), ("DINOv3ConvNext", STAGES), ("VitDet", WITHOUT_INTERMEDIATE)):
        yield Made(f"huggingface/{name}_backbone", partial(_build, f"{name}Backbone", f"{name}Config", options, None), square)
    for name, kind, more in OTHERS:
        yield Made(f"huggingface/{name}", partial(_build, f"{name}{kind}", f"{name}Config", {**TRANSFORMER, **more}, None), square)
    vit = partial(_build, "ViTForImageClassification", "ViTConfig", TRANSFORMER)
    yield Made("huggingface/ViT_checkpointing", partial(vit, "logits", checkpointing=True), square)
    yield Made("huggingface/ViT_as_it_is", partial(vit, None), square)


def _build(
    model: str, config: str, options: dict[str, Any], part: str | None, width: int | None = None, checkpointing: bool = False
) -> nn.Module:
    import transformers

    classes = {} if "Backbone" in model or "VisionModel" in model else {"num_labels": 5}
    made = getattr(transformers, model)(getattr(transformers, config)(**options, **classes))
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made if part is None else OneOutput(made, part, width)
