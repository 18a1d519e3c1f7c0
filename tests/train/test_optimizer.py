from __future__ import annotations

import io
from typing import Any

import pytest
import timm
import torch
from torch import nn

from graphopt import RunError
from graphopt.spec import OptimizerSpec, SchedulerSpec, TrainSpec
from graphopt.train.optimizer import (
    Schedule,
    build_optimizer,
    check_groups,
    head_parameters,
    layer_rates,
    load_optimizer_state,
    named_parameters,
    optimizer_state,
    trainable,
)
from tests.support.backbones import Small


def labels(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, str]:
    """Parameter name -> name of its group."""
    names = {id(p): name for name, p in named_parameters(module).items()}
    return {names[id(p)]: group["name"] for group in optimizer.param_groups for p in group["params"]}


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    torch.manual_seed(1)
    for _ in range(times):
        module(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_biases_norms_and_named_parameters_are_not_decayed() -> None:
    module = Small(blocks=1)
    optimizer = build_optimizer(module, OptimizerSpec(weight_decay=0.1), no_decay={"fc.weight"})
    found = labels(optimizer, module)
    assert found.keys() == trainable(module).keys()
    assert {n for n, label in found.items() if label == "decay"} == {"stem.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight"}
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"decay": 0.1, "no_decay": 0.0}


def test_frozen_parameters_are_in_no_group() -> None:
    module = Small(blocks=2)
    module.blocks[0].requires_grad_(False)
    assert not any(n.startswith("blocks.0") for n in labels(build_optimizer(module, OptimizerSpec()), module))


def test_a_parameter_in_two_groups_or_frozen_in_one_is_an_error() -> None:
    module = nn.Linear(2, 2)
    twice = torch.optim.SGD([module.weight, module.bias], lr=0.1)
    twice.param_groups.append({**twice.param_groups[0], "params": [module.bias]})
    with pytest.raises(RunError, match=r"bias \(trainable\) is in 2"):
        check_groups(twice, module)
    frozen = torch.optim.SGD(module.parameters(), lr=0.1)
    module.weight.requires_grad_(False)
    with pytest.raises(RunError, match=r"weight \(frozen\) is in 1"):
        check_groups(frozen, module)


def test_a_parameter_of_another_module_is_an_error() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(RunError, match="1 parameters in the optimizer are not the module's"):
        check_groups(torch.optim.SGD([*module.parameters(), nn.Parameter(torch.ones(1))], lr=0.1), module)


def test_nothing_left_to_train_is_an_error() -> None:
    with pytest.raises(RunError, match="every parameter is frozen"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerSpec())


def test_tied_parameters_count_once_under_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            first, second = ("z", "a") if swap else ("a", "z")
            setattr(self, first, nn.Linear(2, 2))
            setattr(self, second, getattr(self, first))

    for swap in (False, True):
        assert list(named_parameters(Tied(swap))) == ["a.bias", "a.weight"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adafactor", "rmsprop", "lookahead_adam"])
def test_state_goes_by_name_into_another_order_of_parameters(name: str) -> None:
    spec = OptimizerSpec(name=name, lr=1e-3)

    def make(swap: bool) -> nn.Module:
        torch.manual_seed(0)
        net = Small(blocks=1, drop=0.0)
        if swap:  # as tracing may register them
            net._modules = dict(reversed(net._modules.items()))
        return net

    reference, moved = make(False), make(True)
    optimizer = build_optimizer(reference, spec)
    stepped(reference, optimizer)
    moved.load_state_dict(reference.state_dict())
    file = io.BytesIO()
    torch.save(optimizer_state(optimizer, reference), file)
    file.seek(0)
    other = build_optimizer(moved, spec)
    load_optimizer_state(other, moved, torch.load(file, weights_only=True))
    for module, each in ((reference, optimizer), (moved, other)):
        stepped(module, each)
    ours, theirs = reference.state_dict(), moved.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_leaves_loses_its_state_and_what_comes_back_starts_afresh() -> None:
    module = Small(blocks=2, drop=0.0)
    full = build_optimizer(module, OptimizerSpec(name="adamw"))
    stepped(module, full)
    module.blocks[0].requires_grad_(False)
    less = build_optimizer(module, OptimizerSpec(name="adamw"))
    load_optimizer_state(less, module, optimizer_state(full, module))
    assert optimizer_state(less, module)["state"].keys() == trainable(module).keys()
    module.blocks[0].requires_grad_(True)
    again = build_optimizer(module, OptimizerSpec(name="adamw"))
    load_optimizer_state(again, module, optimizer_state(less, module))
    state = optimizer_state(again, module)["state"]
    assert "blocks.1.conv1.weight" in state
    assert not any(n.startswith("blocks.0") for n in state)


def test_layers_further_from_the_head_learn_more_slowly() -> None:
    net = timm.create_model("resnet18", num_classes=10)
    rates = layer_rates(net, OptimizerSpec(layer_decay=0.5))
    assert rates is not None
    assert rates["fc.weight"] == 1.0 > rates["layer4.1.conv2.weight"] > rates["layer1.0.conv1.weight"] >= rates["conv1.weight"]
    optimizer = build_optimizer(net, OptimizerSpec(lr=1.0), rates=rates)
    Schedule(optimizer, TrainSpec(scheduler=SchedulerSpec(name="constant"), optimizer={"lr": 1.0}, epochs=2), 2).set_step(0)
    found = {name: group["lr"] for group in optimizer.param_groups for name in [group["name"]]}
    assert max(found.values()) == 1.0
    assert len(found) > 4


def test_a_backbone_without_layers_refuses_layer_decay() -> None:
    with pytest.raises(RunError, match="does not define its layers"):
        layer_rates(Small(), OptimizerSpec(layer_decay=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adamv"}, "no optimizer 'adamv'.*adam"),
        ({"name": "adamw", "arguments": {"wings": 2}}, "adamw could not be built.*wings"),
        ({"name": "adamw", "arguments": {"betas": [2.0, 0.9]}}, "adamw could not be built"),
    ],
)
def test_settings_an_optimizer_does_not_take(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        build_optimizer(nn.Linear(2, 2), OptimizerSpec(**change))


def rates(spec: SchedulerSpec, steps: list[int]) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSpec(lr=0.8))
    schedule = Schedule(optimizer, TrainSpec(scheduler=spec, optimizer={"lr": 0.8}, epochs=10), 10)
    return [schedule.set_step(step) for step in steps]


def test_the_rate_is_a_function_of_the_steps_done() -> None:
    assert rates(SchedulerSpec(name="cosine"), [0, 50, 100]) == pytest.approx([0.8, 0.4, 0.0])
    assert rates(SchedulerSpec(name="cosine", warmup_epochs=2, warmup_lr=0.0), [0, 10]) == pytest.approx([0.0, 0.4])
    multistep = SchedulerSpec(name="multistep", decay_milestones=(3, 6), decay_rate=0.5)
    # timm's milestones come one step early.
    assert rates(multistep, [0, 28, 30, 60]) == pytest.approx([0.8, 0.8, 0.4, 0.2])
    assert rates(SchedulerSpec(name="step", decay_epochs=4), [39, 40]) == pytest.approx([0.8, 0.08])
    for name in ("cosine", "poly", "step", "constant"):
        spec = SchedulerSpec(name=name)  # type: ignore[arg-type]
        assert rates(spec, [7, 42])[1:] == rates(spec, [42])


def test_a_new_phase_goes_on_at_the_rate_the_last_one_reached() -> None:
    module = nn.Linear(2, 2)
    spec, cosine = OptimizerSpec(lr=0.8), SchedulerSpec(name="cosine")
    first = build_optimizer(module, spec)
    train = TrainSpec(scheduler=cosine, optimizer={"lr": 0.8}, epochs=10)
    reached = Schedule(first, train, 10).set_step(50)
    second = build_optimizer(module, spec)
    load_optimizer_state(second, module, optimizer_state(first, module))
    assert Schedule(second, train, 10).set_step(50) == reached == second.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "spec",
    [
        SchedulerSpec(name="cosine", arguments={"cycle_mul": 0.0, "cycle_limit": 5}),
        SchedulerSpec(name="step", decay_epochs=0.001, decay_rate=100.0),
    ],
    ids=["no cycle", "overflow"],
)
def test_a_schedule_that_cannot_be_computed_is_an_error_of_its_settings(spec: SchedulerSpec) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = Schedule(optimizer, TrainSpec(scheduler=spec, optimizer={"lr": 0.8}, epochs=10), 10)
    with pytest.raises(RunError, match=r"train\.scheduler: "):
        schedule.set_step(95)


def test_a_rate_of_each_epoch_is_timms() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["name"] = "decay"
    spec = SchedulerSpec(on_updates=False, warmup_epochs=1, warmup_prefix=True, epochs=2)
    schedule = Schedule(optimizer, TrainSpec(epochs=4, scheduler=spec), steps=3)
    rates = [schedule.set_step(step) for step in range(12)]
    assert rates == pytest.approx([1e-5] * 3 + [0.1] * 3 + [0.05] * 3 + [0.0] * 3)


def test_layer_rates_have_a_least() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=3, embed_dim=12, num_heads=2)
    rates = layer_rates(net, OptimizerSpec(layer_decay=0.5, layer_decay_min=0.2))
    assert rates is not None
    assert sorted({*rates.values()}) == [0.2, 0.25, 0.5, 1.0]


def test_the_head_is_the_classifier_or_the_last_linear_layer() -> None:
    assert head_parameters(timm.create_model("test_resnet")) == {"fc.weight", "fc.bias"}
    assert head_parameters(Small()) == {"fc.weight", "fc.bias"}
