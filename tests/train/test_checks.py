from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt import RunError
from graphopt.train.checks import check_frozen, check_gradients, fingerprints
from graphopt.train.optimizer import named_parameters
from tests.support.backbones import Small


def trained() -> Small:
    net = Small(blocks=2)
    net.blocks[0].requires_grad_(False)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    return net


def test_gradients_where_they_must_be_and_nowhere_else() -> None:
    net = trained()
    check_gradients(named_parameters(net))
    net.fc.weight.grad = None
    with pytest.raises(RunError, match=r"first step of the phase: .*without a gradient: fc\.weight"):
        check_gradients(named_parameters(net))
    check_gradients(named_parameters(net), unused={"fc.weight"})


def test_gradients_that_are_not_finite() -> None:
    net = trained()
    assert net.stem.bias.grad is not None
    net.stem.bias.grad[0] = torch.nan
    with pytest.raises(RunError, match=r"not finite: stem\.bias"):
        check_gradients(named_parameters(net))


def test_a_gradient_on_a_frozen_parameter() -> None:
    net = trained()
    net.blocks[0].conv1.weight.grad = torch.zeros_like(net.blocks[0].conv1.weight)
    with pytest.raises(RunError, match=r"frozen but with a gradient: blocks\.0\.conv1\.weight"):
        check_gradients(named_parameters(net))


@pytest.mark.parametrize("name", ["blocks.0.conv1.weight", "blocks.0.bn1.running_var", "blocks.0.bn2.num_batches_tracked"])
def test_one_bit_is_enough(name: str) -> None:
    net = trained()
    before = fingerprints(net)
    check_frozen(net, before)
    tensor = net.state_dict()[name]
    bits = tensor.reshape(-1).view(torch.uint8)
    bits[0] ^= 1
    with pytest.raises(RunError, match=rf"changed during the phase: {name}$"):
        check_frozen(net, before)


def test_negative_zero_and_nan_count_as_the_bits_they_are() -> None:
    net = nn.Linear(1, 1).requires_grad_(False)
    with torch.no_grad():
        net.weight.fill_(0.0)
    before = fingerprints(net)
    with torch.no_grad():
        net.weight.fill_(-0.0)
    with pytest.raises(RunError, match="weight"):
        check_frozen(net, before)


def test_statistics_of_a_trainable_norm_may_move() -> None:
    net = trained()
    before = fingerprints(net)
    assert not any(name.startswith("blocks.1") for name in before)
    net.train()(torch.randn(4, 3, 8, 8))
    with pytest.raises(RunError, match=r"blocks\.0\.bn1\.running_mean"):
        check_frozen(net, before)


def test_every_precision_and_layout_has_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        net = nn.Conv2d(3, 4, 3).requires_grad_(False).to(dtype)
        before = fingerprints(net)
        check_frozen(net.to(memory_format=torch.channels_last), before)  # type: ignore[call-overload]
