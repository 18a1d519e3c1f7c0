"""Supervise beside other passes, in either order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from graphopt.compiler.triggers import Decision
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from tests.passes.supervise_steps import compiled, step
from tests.support.backbones import Small

FREEZES = [["stem"], ["stem", "blocks.0"], ["stem", "blocks.0", "blocks.1"], ["blocks.1"], ["stem", "blocks.0", "blocks.1", "blocks.2"]]


@pytest.mark.parametrize("frozen", FREEZES)
@pytest.mark.parametrize("first", [True, False])
def test_with_freeze(frozen: list[str], first: bool) -> None:
    passes = [Freeze(select=frozen), Supervise(cuts=["blocks.0", "blocks.2"])]
    model = Small(drop=0.0)
    plan = compiled(model, passes if first else passes[::-1], verify="full")
    found = step(plan)
    trains = {n: p.requires_grad for n, p in plan.module.named_parameters()}
    assert {n for n, g in found.items() if g is not None} == {n for n, t in trains.items() if t}
    assert not any(trains[n] for n in trains if n.startswith(tuple(f"{f}." for f in frozen)))
    # What supervises a frozen module rests with it.
    assert trains["supervise.0.decoder.fc.weight"] == (not {"stem", "blocks.0"} <= set(frozen))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plan.module.eval()(x), copy.deepcopy(model).eval()(x))


def test_a_later_phase_freezes_under_supervision() -> None:
    plan = compiled(Small(drop=0.0), [Supervise(modules=4), Freeze(select=["stem", "blocks.0", "blocks.1"], when={"epoch": 3})])
    later = plan.advance_to([Decision(index=1, epoch=3)], verify="full")
    found = step(later)
    assert found["blocks.0.conv1.weight"] is None
    assert found["blocks.2.conv1.weight"] is not None
    assert later.module.state_dict().keys() == plan.module.state_dict().keys()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["mix", "surrogate"])
def test_with_share(first: bool, mode: Any) -> None:
    passes = [Share(select=["blocks.1"], mode=mode), Supervise(cuts=["blocks.0", "blocks.2"])]
    model = Small(drop=0.0)
    plan = compiled(model, passes if first else passes[::-1], verify="full")
    found = step(plan)
    assert all(g is not None for g in found.values())
    # blocks.0's weights serve their own module and, mixed, the next one: they get the sum.
    alone = step(compiled(model, [Supervise(cuts=["blocks.0", "blocks.2"])]))
    assert not torch.equal(found["blocks.0.conv1.weight"], alone["blocks.0.conv1.weight"])


def test_a_shared_weight_gets_the_sum_of_what_its_modules_send() -> None:
    model = Small(drop=0.0)
    plan = compiled(model, [Share(select=["blocks.1"]), Supervise(cuts=["blocks.0", "blocks.2"])])
    detached = compiled(model, [Share(select=["blocks.1"], detach=True), Supervise(cuts=["blocks.0", "blocks.2"])])
    torch.manual_seed(3)
    both = step(plan)["blocks.0.conv1.weight"]
    torch.manual_seed(3)
    own = step(detached)["blocks.0.conv1.weight"]
    assert both is not None
    assert own is not None
    assert not torch.equal(both, own)
    a = plan.graph.module.state_dict()
    assert any(k.endswith(".a") for k in a)


@pytest.mark.parametrize("first", [True, False])
def test_with_checkpointing(first: bool) -> None:
    passes: list[Any] = [Checkpoint(segments=2), Supervise(modules=3)]
    model = Small(drop=0.0)
    steps = []
    for chosen in (passes if first else passes[::-1], passes[1:]):
        torch.manual_seed(3)  # the auxiliary parts' weights and the batch
        steps.append(step(compiled(model, chosen)))
    found, expected = steps
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
