"""Warnings about wasted memory or compute: given where they hold, and nowhere else."""

import pytest
import torch
import torchvision
from torch import nn

from graphopt.cost import advise, forecast, where_memory_is

BLOCKS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        return torchvision.models.resnet18()


def cost(module, batch=64, frozen=()):
    for name, part in module.named_children():
        part.requires_grad_(name not in frozen)
    return forecast(module, (3, 64, 64), batch, per_block=BLOCKS)


def test_a_frozen_open_prefix_names_what_to_freeze_too(resnet):
    (first,) = advise(cost(resnet), cost(resnet, frozen=("layer1", "layer2")))
    assert first.where == "layer1, layer2"
    assert "frozen but open prefix" in first.what
    assert "Freeze conv1, bn1 too" in first.what
    assert first.worth > 0


def test_a_frozen_closed_prefix_is_not(resnet):
    assert advise(cost(resnet), cost(resnet, frozen=("conv1", "bn1", "layer1"))) == ()


def test_what_saves_no_memory_names_what_it_saves_instead(resnet):
    (only,) = advise(cost(resnet), cost(resnet, frozen=("bn1",)))[-1:]
    assert "saves no memory" in only.what
    (same,) = advise(cost(resnet), cost(resnet))
    assert "no FLOPs either" in same.what


def test_what_costs_more_than_it_saves_gives_the_amount():
    small, large = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 8))
    found = advise(forecast(small, (8,), 2), forecast(large, (8,), 2))
    assert any("more at the peak" in a.what and "parameters" in a.what for a in found)
    assert any("more FLOPs a step" in a.what for a in found)


def test_the_part_with_most_of_the_memory_is_named():
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU())
    module = nn.Sequential(stem, nn.Conv2d(64, 4, 3, stride=2), nn.Flatten())
    module.add_module("head", nn.Linear(4 * 15 * 15, 4))
    found = where_memory_is(forecast(module, (3, 32, 32), 64, per_block=["0", "1", "2", "head"]))
    assert [a.where for a in found] == ["0"]
    assert "cut inside it" in found[0].what


def test_a_step_filled_by_its_parameters_is_not_blamed_on_activations():
    (only,) = where_memory_is(forecast(nn.Linear(512, 512), (512,), 2, per_block=[]))
    assert "parameters, gradients and optimizer state" in only.what
