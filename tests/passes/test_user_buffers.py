"""Buffers that a backbone's own code moves: they move once per step, as in the backbone, and rest where the backbone is frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from tests.support.backbones import FourBlocks

SHAPE = (3, 8, 8)


class Averaging(nn.Module):
    """A convolution that subtracts a running average of its input, which its own code moves: traced, node by node."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return self.conv(x - self.average.detach().clone()[:, None, None]).relu() * self.weight


class InTraining(nn.Module):
    """The same in training only: a module without children that asks for the mode stays a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return (x - self.average.clone()[:, None, None]).relu() * self.weight


class WithChildrenInTraining(Averaging):
    """Has a child, moves its average in training only, and reads it nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return self.conv(x).relu() * self.weight


class Reassigning(Averaging):
    """Puts another tensor in its place: cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        return self.conv(x - self.average[:, None, None]).relu() * self.weight


class WritingOnly(Averaging):
    """Reads its average nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        self.average.copy_(0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3)))
        return self.conv(x).relu() * self.weight


def net(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return FourBlocks(block)


def stepped(module: nn.Module, targets: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers after two steps without an update."""
    module.train()
    x, y = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    for _ in range(2):
        output, local = module(x, y) if targets else (module(x), 0)
        (nn.functional.cross_entropy(output, y) + local).backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return gradients, {n: b.clone() for n, b in module.named_buffers() if n.endswith("average")}


BLOCKS = pytest.mark.parametrize(
    "block", [Averaging, InTraining, WithChildrenInTraining, Reassigning, WritingOnly], ids=lambda b: b.__name__
)


@BLOCKS
@pytest.mark.parametrize("passes", [[], [Checkpoint(select="blocks")], [Checkpoint(select="blocks.*")]], ids=["none", "whole", "each"])
def test_buffers_move_once_per_step(block: type[nn.Module], passes: list[Any]) -> None:
    model = net(block)
    plan = graphopt.compile(model, passes, input=SHAPE, costs=False)
    gradients, buffers = stepped(plan.module)
    expected_gradients, expected = stepped(copy.deepcopy(model))
    assert all(torch.equal(buffers[n], expected[n]) and expected[n].any() for n in expected)
    assert all(torch.equal(gradients[n], expected_gradients[n]) for n in expected_gradients)


@pytest.mark.parametrize("block", [Averaging, WritingOnly], ids=lambda b: b.__name__)
def test_supervised_modules_move_their_own_buffers(block: type[nn.Module]) -> None:
    plan = graphopt.compile(net(block), Supervise(modules=2), input=SHAPE, costs=False)
    moved = stepped(plan.module, targets=True)[1]
    expected = stepped(net(block))[1]
    assert all(torch.equal(moved[n], expected[n]) for n in expected)


@pytest.mark.parametrize("block", [Averaging, WritingOnly], ids=lambda b: b.__name__)
@pytest.mark.parametrize(
    ("value", "still"),
    [
        (Freeze(select=("stem", "blocks.0", "blocks.1")), {0, 1}),
        (Freeze(select="blocks.1"), {1}),
        (Freeze(select="blocks.1", lean=False), {1}),
        (Drop(upto="blocks.1"), {0, 1}),
    ],
    ids=["prefix", "behind", "stock", "drop"],
)
def test_buffers_of_what_is_frozen_rest(block: type[nn.Module], value: Any, still: set[int]) -> None:
    plan = graphopt.compile(net(block), value, input=SHAPE, costs=False)
    moved = {int(n.split(".")[1]) for n, b in stepped(plan.module)[1].items() if b.any()}
    assert moved == set(range(4)) - still


def test_a_suffix_on_cached_features_moves_its_own_buffers_only() -> None:
    plan = graphopt.compile(net(WritingOnly), Drop(upto="blocks.1"), input=SHAPE, costs=False)
    features = plan.prefix(torch.rand(4, *SHAPE))
    plan.suffix.train()(features)
    assert {int(n.split(".")[1]) for n, b in plan.module.named_buffers() if b.any()} == {2, 3}
