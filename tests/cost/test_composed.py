"""A step that is put together from recorded parts costs what the whole step does, in every figure, in every phase of a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import timm
import torchvision
from torch import nn

import graphopt
from graphopt.compiler.registry import passes
from graphopt.cost import Cost, forecast
from graphopt.cost.composed import Forecasts
from graphopt.ir.inputs import Input, input_of
from graphopt.models import cifar_resnet as cifar
from tests.support.backbones import Auxiliary, Small, Twice

BATCH = 3


@cache
def backbone(name: str) -> tuple[nn.Module, Input]:
    """Small ones of several families, with the input that they take."""
    if name == "cifar":
        return cifar.build("resnet20"), (3, 8, 8)
    if name == "small":
        return Small(), (3, 8, 8)
    if name == "auxiliary":
        return Auxiliary(), (3, 8, 8)
    if name == "twice":
        return Twice(), (3, 8, 8)
    if name == "vgg":
        layers: list[nn.Module] = []
        for given, wanted in ((3, 4), (4, 6), (6, 6)):
            layers += [nn.Conv2d(given, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(6 * 64, 5)), (3, 8, 8)
    if name == "vit":
        made = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5)
        return made, (3, 16, 16)
    family, _, model = name.partition("/")
    make = timm.create_model if family == "timm" else torchvision.models.get_model
    return make(model, num_classes=5), (3, 32, 32)


def phases(name: str, given: list[dict[str, Any]], epochs: int = 4) -> Iterator[tuple[nn.Module, Input, bool]]:
    """What trains in each phase of a run, the input that it takes, and whether it takes the targets, too."""
    model, shape = backbone(name)
    made = [passes()[table["use"]].model_validate({k: v for k, v in table.items() if k != "use"}) for table in given]
    plan = graphopt.compile(model, made, input=shape, verify="off", costs=False)
    for phase in plan.phases(epochs):
        after = phase.plan
        module = after.module if after.needs.features is None else after.suffix
        yield module, after.graph.input if after.needs.features is None else input_of(module), after.needs.targets


def freeze(select: Any, **more: Any) -> dict[str, Any]:
    return {"use": "freeze", "select": select, **more}


STEPS = {"steps": [{"epoch": 1, "upto": "layer1.0"}, {"epoch": 2, "upto": "layer1.2"}, {"epoch": 3, "upto": "layer2.2"}]}
BLOCKS = ["conv1", "bn1", *(f"layer{stage}.{number}" for stage in (1, 2, 3) for number in (0, 1, 2))]

#: a backbone, passes, and how many of the phases are put together from parts
CASES: list[tuple[str, list[dict[str, Any]], int]] = [
    ("cifar", [], 1),
    ("cifar", [freeze(BLOCKS, when=STEPS)], 4),
    ("cifar", [freeze(BLOCKS, when={"schedule": "freezeout"})], 12),
    ("cifar", [freeze(["layer2", "layer3"], when={"epoch": 1})], 2),
    ("cifar", [freeze(["layer1.1.conv1"], lean=False)], 1),
    ("cifar", [freeze(["conv1", "bn1", "layer1"], when={"epoch": 1, "until": 2})], 3),
    ("cifar", [{"use": "drop", "upto": "layer2.0", "when": {"epoch": 1}}], 2),
    ("cifar", [{"use": "resize", "size": 6, "when": {"epoch": 0, "until": 2}}, freeze(BLOCKS, when=STEPS)], 4),
    ("cifar", [freeze(["conv1", "bn1", "layer1"], when={"epoch": 1}), {"use": "checkpoint", "select": "layer2"}], 0),
    ("cifar", [{"use": "supervise", "modules": 2}], 0),
    ("cifar", [{"use": "share", "select": ["layer1.1"]}], 1),
    ("vgg", [freeze(["0", "1", "3", "4"], when={"epoch": 1})], 2),
    ("vit", [freeze(["patch_embed", "cls_token", "pos_embed", "blocks.0"], when={"epoch": 1})], 2),
    ("small", [], 1),
    ("auxiliary", [], 1),
    ("twice", [], 1),
    ("timm/test_efficientnet", [freeze(["conv_stem", "bn1", "blocks.0"], when={"epoch": 2})], 2),
    ("timm/test_convnext", [freeze(["stem", "stages.0"], when={"epoch": 2})], 2),
    ("torchvision/shufflenet_v2_x0_5", [freeze(["conv1", "stage2"], when={"epoch": 2})], 2),
]


def name_of(case: tuple[str, list[dict[str, Any]], int]) -> str:
    return "-".join((case[0], *(table["use"] for table in case[1])))


def equal(forecasts: Forecasts, module: nn.Module, shape: Input, targets: bool) -> Cost:
    found = forecasts.of(module, shape, targets=targets)
    expected = forecast(module, shape, BATCH, targets=targets, **forecasts.options)
    assert found.to_dict() == expected.to_dict()
    assert found == expected
    return found


@pytest.mark.parametrize(("name", "given", "composed"), CASES, ids=map(name_of, CASES))
def test_each_phase_costs_what_the_whole_step_does(name: str, given: list[dict[str, Any]], composed: int) -> None:
    forecasts = Forecasts(BATCH)
    for module, shape, targets in phases(name, given):
        equal(forecasts, module, shape, targets)
    assert forecasts.composed == composed


OPTIONS: list[dict[str, Any]] = [
    {"channels_last": True},
    {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}},
    {"optimizer": "momentum", "optimizer_options": {"momentum": 0.0}},
    {"optimizer": "sgd", "optimizer_options": {"weight_decay": 0.1, "foreach": True}},
    {"optimizer": "lamb"},
    {"optimizer": None},
    {"loss": "binary_cross_entropy"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_other_options(options: dict[str, Any]) -> None:
    forecasts = Forecasts(BATCH, **options)
    for count, (module, shape, targets) in enumerate(phases("cifar", [freeze(BLOCKS, when=STEPS)]), start=1):
        equal(forecasts, module, shape, targets)
        assert forecasts.composed == count


@pytest.mark.parametrize("options", [{"amp": "bfloat16"}, {"accumulate": 3}], ids=str)
def test_what_reaches_across_parts_is_forecast_whole(options: dict[str, Any]) -> None:
    forecasts = Forecasts(BATCH, **options)
    for module, shape, targets in phases("cifar", []):
        equal(forecasts, module, shape, targets)
    assert forecasts.composed == 0


def test_a_phase_runs_only_the_parts_that_are_new() -> None:
    forecasts, ran = Forecasts(BATCH), list[int]()
    for module, shape, _ in phases("cifar", [freeze(BLOCKS, when=STEPS)]):
        before = forecasts.ran
        forecasts.of(module, shape)
        ran.append(forecasts.ran - before)
    assert all(0 < later < ran[0] / 2 for later in ran[1:])
