"""Stages of a chain: what each is forecast to hold is what its real step holds, and what crosses a cut is known before."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import graphopt
from graphopt import Pass
from graphopt.compiler.stages import every_module, stages
from graphopt.cost import Cost, measure
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise

ADAMW: dict[str, Any] = {"optimizer": "adamw"}
MICRO: dict[str, Any] = {"accumulate": 4}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=3, embed_dim=16, num_heads=2, num_classes=5)


def resnet() -> nn.Module:
    return cifar.build("resnet8")


CASES: dict[str, tuple[Any, tuple[int, ...], list[Pass], dict[str, Any]]] = {
    "resnet": (resnet, (3, 8, 8), [Supervise(modules=3)], {}),
    "image decoder, micro-batches": (resnet, (3, 8, 8), [Supervise(modules=2, decoder="image")], MICRO),
    "vit, bfloat16": (vit, (3, 16, 16), [Supervise(modules=3)], {**ADAMW, "amp": "bfloat16"}),
    "frozen front": (resnet, (3, 8, 8), [Supervise(modules=3), Freeze(select=["conv1", "bn1", "layer1"])], {}),
    "dropped front": (resnet, (3, 8, 8), [Drop(upto="layer1.0"), Supervise(modules=3)], {}),
}


def figures(cost: Cost) -> dict[str, int]:
    sizes = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "buffer_bytes", "input_bytes", "saved_activation_bytes", "peak_bytes")
    return {name: getattr(cost, name) for name in sizes}


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_of_a_stage_is_what_its_step_holds(name: str) -> None:
    make, input, passes, training = CASES[name]
    plan = graphopt.compile(make(), passes, input=input, verify="off", costs=False)
    found, batch = stages(plan, every_module(plan), 4, training.get("amp")), 4 * training.get("accumulate", 1)
    for stage in found:
        real = measure(stage.module, (), batch, **{**training, **stage.options})
        assert figures(stage.forecast(batch, **training)) == figures(real), stage.modules
    assert [s.sent_bytes for s in found[:-1]] == [s.received_bytes for s in found[1:]]
    assert found[-1].outgoing == ()


def test_parts_hold_all_parameters_once_and_do_all_work_once() -> None:
    plan = graphopt.compile(resnet(), Supervise(modules=3), input=(3, 8, 8), verify="off", costs=False)
    split, (whole,) = (stages(plan, runs, 4) for runs in (every_module(plan), [range(3)]))
    steps = [stage.forecast(4) for stage in split]
    step = whole.forecast(4)
    assert sum(s.parameters for s in steps) == step.parameters
    assert sum(s.flops for s in steps) == step.flops
    assert max(s.peak_bytes for s in steps) < step.peak_bytes


def test_what_crosses_a_cut_is_described_by_layout_and_type() -> None:
    plan = graphopt.compile(resnet(), Supervise(cuts=["layer1.0"]), input=(3, 8, 8), verify="off", costs=False)
    first, last = stages(plan, every_module(plan), 4)
    activation, loss = first.outgoing
    assert (activation.shape, activation.dtype, activation.is_meta) == ((4, 16, 8, 8), torch.float32, True)
    assert loss.shape == ()
    assert first.sent_bytes == 4 * (4 * 16 * 8 * 8 + 1)
    assert (first.first, last.first, [*first.modules], [*last.modules]) == (True, False, [0], [1])
