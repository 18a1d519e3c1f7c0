"""Layouts: which dimension of an activation is its channels, and what grid its positions lie on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.ir.regions import region_at
from graphopt.passes.supervise.layout import layout_of
from tests.passes.supervise_backbones import BACKBONES

LAYOUTS = [
    ("vit", "blocks.0", (2, 48, 5, (2, 2), 1)),
    ("swin, timm", "layers.0.blocks.0", (3, 24, 49, (7, 7), 0)),
    ("swin, torchvision", "features.1.0", (3, 24, 64, (8, 8), 0)),
    ("convnext", "stages.1.blocks.0", (1, 16, 16, (4, 4), 0)),
    ("pvt", "stages.1.blocks.0", (2, 64, 64, (8, 8), 0)),
    ("mixer", "blocks.1", (2, 64, 4, (2, 2), 0)),
    ("resnet18", "layer1.0", (1, 64, 64, (8, 8), 0)),
]


@pytest.mark.parametrize(("name", "path", "expected"), LAYOUTS)
def test_layouts_are_read_off_the_graph(name: str, path: str, expected: tuple[Any, ...]) -> None:
    make, input = BACKBONES[name]
    graph = graphopt.trace(make(), input, compare=False)
    found = layout_of(graph, region_at(graph, path).exits[0])
    assert (found.channel, found.channels, found.length, found.grid, found.prefix) == expected


def test_a_map_with_as_many_channels_as_rows_is_told_by_its_neighbours() -> None:
    class Square(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.last = last
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 10)
            self.mix = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if self.last:
                return self.fc(self.norm(y.permute(0, 2, 3, 1).contiguous()).mean((1, 2)))
            return self.fc(self.mix(y).mean((2, 3)))

    for last, channel in ((True, 3), (False, 1)):
        graph = graphopt.trace(Square(last), (3, 8, 8))
        node = region_at(graph, "norm" if last else "conv").exits[0]
        assert layout_of(graph, node).channel == channel
