"""A backbone traced at another size of its input, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from graphopt.errors import TraceError
from graphopt.models.cifar_resnet import build
from graphopt.tracing.resizing import trace_at
from tests.support.backbones import Small

VIT: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 4}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "num_classes": 4,
}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(name, **{**VIT, "patch_size": 8, **options})


#: backbone, size, names of the parameters that are resampled
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], list[str]]] = {
    "convolutions": (lambda: build("resnet8"), (12, 20), []),
    "ViT": (vit, (16, 24), ["pos_embed"]),
    "ViT without class token": (lambda: vit(class_token=False, global_pool="avg"), (24, 24), ["pos_embed"]),
    "ViT with registers": (lambda: vit(reg_tokens=2), (16, 16), ["pos_embed"]),
    "ViT with rotary embeddings": (lambda: vit("eva02_tiny_patch14_224"), (16, 16), ["pos_embed"]),
    "ViT of torchvision": (lambda: torchvision.models.VisionTransformer(32, 8, 1, 1, 16, 32), (16, 16), ["encoder.pos_embedding"]),
    # 8x8 and 4x4 patches in windows of 4x4 become 6x6 and 3x3: the first are padded, the second smaller than a window.
    "Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN), (24, 24), []),
    "Swin v2": (lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN), (24, 24), []),
    "Swin of torchvision": (lambda: torchvision.models.SwinTransformer([4, 4], 8, [2], [1], [4, 4]), (24, 24), []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_has_the_same_parameters_and_computes_what_the_library_does(case: str) -> None:
    """That it does is checked by `trace_at` itself, in both modes."""
    make, size, resampled = CASES[case]
    torch.manual_seed(0)
    backbone = make()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    graph = trace_at(backbone, (3, *size))
    theirs = dict(backbone.named_parameters())
    assert all(p is theirs[n] for n, p in graph.module.named_parameters())
    assert graph.module.state_dict().keys() == before.keys()
    assert [str(n.args[0].target) for n in graph.nodes if "resample" in str(n.target)] == resampled
    graph.module(torch.rand(2, 3, *size)).sum().backward()
    assert all(theirs[name].grad is not None for name in resampled)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items()), "the backbone is left as it was"


def test_a_position_embedding_learns_at_its_own_size() -> None:
    backbone = vit()
    graph = trace_at(backbone, (3, 16, 16))
    graph.module(torch.rand(2, 3, 16, 16)).sum().backward()
    gradient = backbone.get_parameter("pos_embed").grad
    assert gradient is not None
    assert gradient.shape == (1, 17, 16)


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@pytest.mark.parametrize(
    ("make", "size", "says"),
    [
        (vit, 20, r"patches of 8x8 do not divide 20x20.*16x16"),
        (lambda: torchvision.models.VisionTransformer(32, 8, 1, 1, 16, 32), 20, "do not divide"),
        (lambda: timm.create_model("mixer_s32_224", img_size=64), 96, r"at 96x96: .*height \(96\)"),
        (lambda: vit("beit_base_patch16_224"), 16, r"relative_position_bias_table: .*is no position embedding.*leave resize out"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 16, "at 16x16: "),
    ],
    ids=["patches", "torchvision's patches", "mixer", "relative positions of all patches", "linear"],
)
def test_what_cannot_be_resized_says_why(make: Callable[[], nn.Module], size: int, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace_at(make(), (3, size, size))


def test_the_own_size_is_the_same_graph() -> None:
    backbone = Small(drop=0.0).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(trace_at(backbone, (3, 8, 8)).module.eval()(x), backbone(x))
