"""Which activations move with the image: shown on real maps, and refused with the operation that is to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from graphopt import Graph, PassError
from graphopt.compiler.emit import emit
from graphopt.ir.shifts import croppable, moving
from tests.support.graphs import graph_of

SIDE, EDGE = 32, 4


def last(graph: Graph) -> Node:
    return graph.output.all_input_nodes[0]


def conv(stride: int = 1, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, stride, padding=1, **more)


def channels_last(self: Any, x: Tensor) -> Tensor:
    """As ConvNeXt: a norm and linear layers over the channels of each position."""
    y = self.norm(self.conv(x).permute(0, 2, 3, 1))
    return F.gelu(self.linear(y)).permute(0, 3, 1, 2)


def every_second(self: Any, x: Tensor) -> Tensor:
    """As the shortcut of a ResNet without parameters."""
    return self.conv(x) + F.pad(x[:, :2, ::2, ::2], (0, 0, 0, 0, 1, 1))


def shuffled(self: Any, x: Tensor) -> Tensor:
    """As ShuffleNet: half of the channels pass, and groups are mixed."""
    one, other = x.chunk(2, dim=1)
    y = torch.cat([one, self.conv(other)], dim=1)
    return y.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)


MOVING: dict[str, tuple[Callable[[Any, Tensor], Any], int, dict[str, Any]]] = {
    "convolutions": (lambda m, x: F.relu(m.norm(m.two(m.one(x)))), 2, {"one": conv(2), "two": conv(), "norm": nn.BatchNorm2d(4)}),
    "pools": (lambda m, x: F.avg_pool2d(F.max_pool2d(m.one(x), 3, 2, 1), 2), 4, {"one": conv()}),
    "channels last": (channels_last, 1, {"conv": conv(groups=4), "norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)}),
    "shortcut": (every_second, 2, {"conv": conv(2)}),
    "groups": (shuffled, 1, {"conv": nn.Conv2d(2, 2, 3, padding=1)}),
    "activations": (
        lambda m, x: m.c(F.hardswish(m.a(x)) * torch.sigmoid(m.b(x)).clamp(max=0.9)),
        1,
        {"a": conv(), "b": conv(), "c": nn.PReLU(4)},
    ),
}


@pytest.mark.parametrize("name", MOVING)
def test_a_crop_of_the_map_is_the_map_of_the_crop(name: str) -> None:
    torch.manual_seed(0)
    function, stride, parts = MOVING[name]
    graph = graph_of(function, 4, SIDE, SIDE, **parts)
    found = moving(graph, last(graph))
    assert found.stride == (stride, stride)
    prefix = emit(graph).eval()
    larger = torch.randn(2, 4, SIDE + 2 * EDGE, SIDE + 3 * EDGE)
    with torch.no_grad():
        whole, part = prefix(larger), prefix(larger[:, :, EDGE : EDGE + SIDE, 2 * EDGE : 2 * EDGE + SIDE])
    assert tuple(part.shape[1:]) == found.shape
    y, x, height, width = EDGE // stride, 2 * EDGE // stride, *part.shape[2:]
    crop, inner = whole[:, :, y : y + height, x : x + width], (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(crop[inner], part[inner])


FIXED: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any], str]] = {
    "gate": (lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), {}, "mean is taken over positions"),
    "group norm": (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 4)}, "native_group_norm is not known"),
    "norm of all": (lambda m, x: m.norm(x), {"norm": nn.LayerNorm([4, 8, 8])}, "statistics over positions"),
    "embedding": (
        lambda m, x: x + m.place,
        {"place": nn.Parameter(torch.randn(1, 4, 8, 8))},
        "add brings values of its own to each position",
    ),
    "columns": (lambda m, x: x * m.place, {"place": nn.Parameter(torch.randn(8))}, "mul brings values of its own"),
    "windows": (lambda m, x: x.unflatten(2, (2, 4)).amax(3), {}, "view divides the map"),
    "tokens": (lambda m, x: F.softmax(x.flatten(2), -1), {}, "a softmax is taken over positions"),
    "attention": (lambda m, x: x.flatten(2).transpose(1, 2) @ x.flatten(2), {}, "not known to treat all positions alike|mixes positions"),
    "part": (lambda m, x: x[:, :, 2:], {}, "takes some of the positions"),
    "flip": (lambda m, x: x.flip(-1), {}, "flip is not known"),
    "larger": (lambda m, x: m.up(x), {"up": nn.ConvTranspose2d(4, 4, 2, 2)}, "transposed convolution"),
    "flat": (lambda m, x: m.linear(x.flatten(1)), {"linear": nn.Linear(256, 4)}, "mixes positions"),
    "tokens, no map": (lambda m, x: x.flatten(2), {}, "no map"),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_does_not_move_is_refused_by_operation(name: str) -> None:
    function, parts, says = FIXED[name]
    graph = graph_of(lambda m, x: function(m, torch.tanh(x)), 4, 8, 8, **parts)
    with pytest.raises(PassError, match=says) as caught:
        moving(graph, last(graph))
    assert "node" in str(caught.value.where)


@pytest.mark.parametrize(("stride", "shape", "pixels"), [(1, (4, 40, 40), (8, 8)), (2, (4, 20, 20), (8, 8)), (4, (4, 10, 10), (8, 8))])
def test_the_map_of_the_padded_image_is_what_crops_are_taken_from(stride: int, shape: tuple[int, ...], pixels: tuple[int, int]) -> None:
    kernel = 3 if stride == 1 else 4
    graph = graph_of(lambda m, x: m.conv(x), 4, 32, 32, conv=nn.Conv2d(4, 4, kernel, stride, (kernel - stride) // 2))
    found = croppable(graph, last(graph))
    assert (found.shape, found.pixels) == (shape, pixels)


def test_crops_of_fewer_pixels_than_a_position_has_are_none() -> None:
    graph = graph_of(lambda m, x: m.conv(x), 4, 24, 24, conv=nn.Conv2d(4, 4, 4, 4))
    with pytest.raises(PassError, match="an image of 24x24 by 3 pixels at most, and the map has a stride of 4"):
        croppable(graph, last(graph))


def test_a_size_that_is_written_into_the_graph_is_refused() -> None:
    graph = graph_of(lambda m, x: x.view(-1, 2, 2, 16, 16).transpose(1, 2).reshape(-1, 4, 16, 16), 4, 16, 16)
    with pytest.raises(PassError, match="cannot be followed"):
        croppable(graph, last(graph))
