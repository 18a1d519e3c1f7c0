"""Emitted modules, whatever passes made them, cost in the forecast what they cost in a real step; compiled and run as users run them."""

import pytest
import torch
import torchvision

import graphopt
from graphopt.compiler.registry import passes
from graphopt.cost import forecast, measure
from graphopt.models import cifar_resnet as cifar

HALF = ["conv1", "bn1", "layer1", "layer2"]
TABLES = {
    "frozen prefix": [{"use": "freeze", "select": HALF}],
    "frozen after the stem": [{"use": "freeze", "select": HALF[2:]}],
    "checkpointed": [{"use": "checkpoint", "segments": 3}],
    "shared": [{"use": "share", "every": 2}],
    "surrogates": [{"use": "share", "every": 2, "mode": "surrogate"}],
    "supervised": [{"use": "supervise", "modules": 3}],
    "supervised, image decoder": [{"use": "supervise", "modules": 2, "decoder": "image"}],
    "supervised, blocks ahead": [{"use": "supervise", "modules": 3, "decoder": "none", "head": "ahead", "lookahead": {"ema": 0.5}}],
    "supervised and checkpointed": [{"use": "supervise", "modules": 2}, {"use": "checkpoint", "segments": 4}],
    "frozen and checkpointed": [{"use": "freeze", "select": HALF[:3]}, {"use": "checkpoint", "segments": 4}],
}


def value(table):
    return passes()[table["use"]].model_validate({k: v for k, v in table.items() if k != "use"})


@pytest.mark.parametrize("name", TABLES)
def test_equals_a_real_step(name):
    torch.manual_seed(0)
    # Sharing needs equal neighbours, which two blocks a stage do not give.
    model = cifar.build("resnet20") if TABLES[name][0]["use"] == "share" else torchvision.models.resnet18(num_classes=10)
    plan = graphopt.compile(model, [value(t) for t in TABLES[name]], input=(3, 32, 32), verify="off", costs=False)
    options = {"targets": plan.needs.targets}
    expected, real = forecast(plan.module, (3, 32, 32), 4, **options), measure(plan.module, (3, 32, 32), 4, **options)
    keys = ("saved_activation_bytes", "peak_bytes", "peak_activation_bytes", "gradient_bytes", "optimizer_bytes", "forward_flops")
    assert {k: getattr(expected, k) for k in keys} == {k: getattr(real, k) for k in keys}
