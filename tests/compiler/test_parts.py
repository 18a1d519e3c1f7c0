"""Parts of an emitted module, run one after the other, are the module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import Pass, PassError, Plan
from graphopt.compiler.parts import Part, isolated_modules, singly, split
from graphopt.models import cifar_resnet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.runtime.randomness import begin_stream, set_seeds
from tests.support.backbones import Small

Make = Callable[[], nn.Module]
THREE = ("blocks.0", "blocks.1")


def resnet() -> nn.Module:
    return cifar_resnet.build("resnet8", num_classes=10)


def vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10, proj_drop_rate=0.1, drop_path_rate=0.2)


def swin() -> nn.Module:
    sizes = {"img_size": 28, "window_size": 7, "embed_dim": 12, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=10, drop_path_rate=0.2)


#: a backbone, the side of its images, passes, and how the modules are run together
CASES: dict[str, tuple[Make, int, tuple[Pass, ...], Sequence[int]]] = {
    "resnet": (resnet, 8, (Supervise(modules=3),), (1, 1, 1)),
    "two runs": (resnet, 8, (Supervise(modules=3),), (2, 1)),
    "an empty run": (resnet, 8, (Supervise(modules=3),), (0, 1, 2)),
    "image decoder": (resnet, 8, (Supervise(modules=3, decoder="image", head="conv"),), (1, 1, 1)),
    "blocks ahead": (Small, 8, (Supervise(cuts=THREE, decoder="none", head="ahead"),), (1, 1, 1)),
    "vit with dropout": (vit, 16, (Supervise(modules=3),), (1, 1, 1)),
    "swin": (swin, 28, (Supervise(balance="stage"),), (1, 1, 1)),
    "frozen, shared, checkpointed": (
        Small,
        8,
        (Supervise(cuts=["blocks.0"]), Freeze(select=["stem", "blocks.0"]), Share(select="blocks.2"), Checkpoint(segments=3)),
        (1, 1),
    ),
    "bypassed": (Small, 8, (Supervise(cuts=THREE), Drop(mode="bypass", probability=0.5)), (1, 2)),
    "without local losses": (Small, 8, (), (1,)),
}


def compiled(make: Make, side: int, passes: Sequence[Pass]) -> Plan:
    torch.manual_seed(0)
    return graphopt.compile(make(), list(passes), input=(3, side, side), verify="off", costs=False)


def runs_of(lengths: Sequence[int]) -> list[range]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def through(parts: Sequence[Part], x: Tensor, target: Tensor | None) -> tuple[Any, list[Tensor]]:
    """The last part's result, and the local losses, whose values alone travel."""
    values, losses = (x,), []
    for part in parts:
        if part.stream:
            begin_stream(part.stream)
        values = part.module(*values, target)
        if not part.last:
            assert len(values) == len(part.outgoing)
            losses += [values[i] for i in part.losses if values[i] is not None]
            values = tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
    return values, losses


def step(module: nn.Module, call: Callable[[Tensor, Tensor], tuple[Any, list[Tensor]]], x: Tensor, y: Tensor, needs: bool) -> Tensor:
    """One step of SGD; the loss of the whole network."""
    module.zero_grad()
    set_seeds(lambda: 1, 2)
    result, losses = call(x, y)
    output, local = result if needs else (result, torch.zeros(()))
    loss = F.cross_entropy(output, y) + local
    for one in (loss, *losses):
        if one.requires_grad:
            one.backward()
    set_seeds(None, None)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return loss.detach()


@pytest.mark.parametrize("name", CASES)
def test_parts_one_after_the_other_are_the_module(name: str) -> None:
    make, side, passes, lengths = CASES[name]
    plan = compiled(make, side, passes)
    whole, divided = plan.module, copy.deepcopy(plan.module)
    parts = split(divided, runs_of(lengths))
    x, y = torch.rand(4, 3, side, side), torch.arange(4)
    for _ in range(3):
        one = step(whole, lambda x, y: (whole(x, y) if plan.needs.targets else whole(x), []), x, y, plan.needs.targets)
        other = step(divided, lambda x, y: through(parts, x, y), x, y, plan.needs.targets)
        assert torch.equal(one, other)
    expected, found = whole.state_dict(), divided.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    whole.eval(), divided.eval(), [part.module.eval() for part in parts]
    assert torch.equal(whole(x), through(parts, x, None)[0])


@pytest.mark.parametrize("name", CASES)
def test_parts_hold_each_tensor_once_under_its_own_name(name: str) -> None:
    make, side, passes, lengths = CASES[name]
    plan = compiled(make, side, passes)
    parts = split(plan.module, runs_of(lengths))
    state = plan.module.state_dict(keep_vars=True)
    held: dict[str, Tensor] = {}
    for part in parts:
        own = part.module.state_dict(keep_vars=True)
        assert not held.keys() & own.keys()
        held |= own
    assert held.keys() == state.keys()
    assert all(held[key] is state[key] for key in state if not key.endswith("_extra_state"))
    persistent = {k for k, _ in plan.module.named_buffers()} - state.keys()
    assert persistent == {k for part in parts for k, _ in part.module.named_buffers()} - state.keys()


def test_a_suffix_is_divided_as_the_whole_network_is() -> None:
    """Behind the cut of a dropped prefix, modules keep their numbers; a part of earlier ones hands the features on."""
    plan = compiled(Small, 8, (Drop(upto="blocks.1"), Supervise(cuts=["blocks.0", "blocks.1", "blocks.2"], decoder="none")))
    assert isolated_modules(plan.module) == 4
    parts = split(plan.suffix, runs_of((1, 1, 1, 1)))
    assert [sum(p.requires_grad for p in part.module.parameters()) > 0 for part in parts] == [False, False, True, True]
    features, y = plan.prefix(torch.rand(4, 3, 8, 8)).detach(), torch.arange(4)
    assert parts[0].module(features, None) == (features,)
    set_seeds(lambda: 1, 2)
    whole = plan.suffix(features, y)
    set_seeds(lambda: 1, 2)
    for one, other in zip(whole, through(parts, features, y)[0], strict=True):
        assert torch.equal(one, other)
    set_seeds(None, None)


class Tied(Small):
    """Its last block has the first one's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].conv1.weight = self.blocks[0].conv1.weight


class Counting(Small):
    """Counts its forwards in a buffer that two blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x)) * self.scale
        self.scale.mul_(0.5)
        return self.fc((self.blocks[3](self.blocks[2](self.blocks[1](x))) * self.scale).mean((2, 3)))


REFUSED = {
    "tied": (Tied, (Supervise(modules=2),), r"blocks\.0\.conv1\.weight and blocks\.3\.conv1\.weight .* in module 1 and module 2"),
    "one tensor twice": (
        Small,
        (Supervise(cuts=["blocks.1"]), Share(select="blocks.2")),
        r"blocks\.1\.conv\d\.weight changes in training, and is in module 1 and module 2",
    ),
    "a buffer": (Counting, (Supervise(cuts=["blocks.1"]),), "scale changes in training, and is in module 1 and module 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_in_two_modules_is_refused(name: str) -> None:
    make, passes, message = REFUSED[name]
    with pytest.raises(PassError, match=message):
        singly(compiled(make, 8, passes).module)
