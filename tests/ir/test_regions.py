"""Regions, cut points and blocks of real families."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import timm
import torchvision
from torch import nn

from graphopt import Graph, SelectError, trace
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.nodes import activations
from graphopt.ir.regions import region_at
from graphopt.models.cifar_resnet import build as cifar
from tests.support import backbones


def _tv(name: str, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **arguments)


def _timm(name: str, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **arguments)


# name: factory, input, cut points, blocks, first and last block, its kind
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, str, str, str]] = {
    "resnet50": (_tv("resnet50"), (3, 64, 64), 39, 16, "layer1.0", "layer4.2", "Bottleneck"),
    "resnet152": (_tv("resnet152"), (3, 64, 64), 107, 50, "layer1.0", "layer4.2", "Bottleneck"),
    "vit_b_16": (
        _tv("vit_b_16", image_size=32), (3, 32, 32), 33, 12,
        "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", "EncoderBlock",
    ),
    "swin_t": (_tv("swin_t"), (3, 64, 64), 41, 12, "features.1.0", "features.7.1", "SwinTransformerBlock"),
    "efficientnet_b0": (_tv("efficientnet_b0"), (3, 64, 64), 79, 16, "features.1.0", "features.7.0", "MBConv"),
    "densenet121": (_tv("densenet121"), (3, 64, 64), 25, 4, "features.denseblock1", "features.denseblock4", "_DenseBlock"),
    "vgg11": (_tv("vgg11"), (3, 32, 32), 30, 8, "features.0-2", "features.18-20", "Conv2d unit"),
    "shufflenet": (_tv("shufflenet_v2_x0_5"), (3, 64, 64), 89, 16, "stage2.0", "stage4.3", "InvertedResidual"),
    "timm swin": (
        _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2), (3, 64, 64), 76, 12,
        "layers.0.blocks.0", "layers.3.blocks.1", "SwinTransformerBlock",
    ),
    "timm convnext": (_timm("convnext_tiny"), (3, 64, 64), 45, 18, "stages.0.blocks.0", "stages.3.blocks.2", "ConvNeXtBlock"),
    "timm resnet50": (_timm("resnet50"), (3, 64, 64), 39, 16, "layer1.0", "layer4.2", "Bottleneck"),
    "cifar resnet110": (lambda: cifar("resnet110"), (3, 32, 32), 0, 54, "layer1.0", "layer3.17", "BasicBlock"),
    "a user's own": (backbones.Small, (3, 8, 8), 0, 4, "blocks.0", "blocks.3", "Residual"),
}  # fmt: skip


@cache
def graph_of(name: str) -> Graph:
    factory, shape, *_ = FAMILIES[name]
    return trace(factory(), shape, compare=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_familys_own(name: str) -> None:
    *_, count, first, last, kind = FAMILIES[name]
    blocks = find_blocks(graph_of(name))
    assert (len(blocks), blocks[0].name, blocks[-1].name) == (count, first, last)
    assert {b.kind for b in blocks} == {kind}
    assert all(b.closed for b in blocks)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f[2]])
def test_cut_points_are_counted_as_published(name: str) -> None:
    # The counts of ResNet, ViT and DenseNet were found independently, by another walk over another trace.
    assert len(cut_points(graph_of(name))) == FAMILIES[name][2]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_cut_point_the_output_is_out_of_reach(name: str) -> None:
    graph = graph_of(name)
    active = activations(graph)
    for cut in cut_points(graph)[:: max(1, len(cut_points(graph)) // 7)]:
        reached = {graph.placeholder}
        for node in graph.nodes:
            if node is not cut and (node in active or node.op == "output") and reached & set(node.all_input_nodes):
                reached.add(node)
        assert graph.output not in reached, cut


def test_a_region_knows_its_edges_and_parameters() -> None:
    graph = graph_of("resnet50")
    block = region_at(graph, "layer2.0")
    assert block.closed
    assert block.entries == (region_at(graph, "layer1").exits)
    assert set(block.parameters) == {f"layer2.0.{n}" for n, _ in torchvision.models.resnet50().layer2[0].named_parameters()}
    whole = region_at(graph, "layer2")
    assert whole.covers(block)
    assert not block.covers(whole)
    assert not region_at(graph_of("densenet121"), "features.denseblock1.denselayer2").closed


def test_a_parameter_that_the_root_reads_is_a_region() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    region = region_at(trace(model, (3, 32, 32), compare=False), "cls_token")
    assert region.parameters == ("cls_token",)


def test_an_unknown_path_names_its_neighbours() -> None:
    with pytest.raises(SelectError, match="layer1"):
        region_at(graph_of("resnet50"), "layr1")
