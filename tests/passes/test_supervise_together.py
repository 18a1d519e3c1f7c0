"""Supervise beside other passes, in either order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graphopt
from graphopt.compiler.triggers import Decision
from graphopt.models import cifar_resnet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.runtime.body import Checkpointed
from tests.passes.supervise_backbones import BACKBONES
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
    # What supervises a frozen module is frozen with it.
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


CHECKPOINTED = {"resnet20": (lambda: cifar_resnet.build("resnet20"), (3, 32, 32)), "vit": BACKBONES["vit"], "swin": BACKBONES["swin, timm"]}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_with_checkpointing(name: str) -> None:
    make, input = CHECKPOINTED[name]
    torch.manual_seed(0)
    model = make()

    def gradients(passes: list[Any]) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(3)  # the auxiliary parts' weights and the batch
        return step(compiled(model, passes, input, verify="fast"), input)

    for modules, segments in ((2, 2), (3, 1), (4, 2)):
        passes: list[Any] = [Supervise(modules=modules), Checkpoint(segments=segments)]
        expected = gradients(passes[:1])
        for found in (gradients(passes), gradients(passes[::-1])):
            assert found.keys() == expected.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(found[parameter], gradient)


class Enclosing(graphopt.Pass):
    """Runs all nodes but the last two in a section of its own."""

    name = "enclosing"

    def match(self, graph: graphopt.Graph) -> graphopt.Match[None]:
        return graphopt.Match(graphopt.select("blocks", graph))

    def rewrite(self, edit: graphopt.Editor, match: graphopt.ActiveMatch[None]) -> graphopt.Effects:
        inner = [n for n in edit.graph.nodes if n.op not in ("placeholder", "output")]
        edit.outline(inner[:-2], Checkpointed, "enclosing")
        return graphopt.Effects()


@pytest.mark.parametrize("first", [True, False])
def test_a_section_around_local_modules_is_divided(first: bool) -> None:
    passes: list[Any] = [Supervise(modules=3), Enclosing()]
    plan = compiled(Small(drop=0.0), passes if first else passes[::-1], verify="full")
    assert all(g is not None for g in step(plan).values())
    local = [s for s in plan.graph.sections if s.target]
    others = [s for s in plan.graph.sections if not s.target]
    assert len(local) == 2
    assert len(others) == 3
    assert not any(set(one.nodes) & set(other.nodes) for one in local for other in others if not set(other.nodes) <= set(one.nodes))
