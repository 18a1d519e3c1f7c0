"""Cuts by time: what is predicted of modules, which cuts follow from it, and that they stay once they are chosen."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pydantic
import pytest
import timm
import torch
from torch import nn

import graphopt
from graphopt import PassError
from graphopt.cost import forecast
from graphopt.cost.partition import Table
from graphopt.cost.rates import Rates, TimedStep
from graphopt.driver import settle
from graphopt.ir.partition import cut_candidates
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.supervise import Supervise
from graphopt.passes.supervise.balance import predicted_seconds
from graphopt.spec import TrainSpec, dumps, from_table, loads
from graphopt.train.preflight import settled
from graphopt.train.ranks import ALONE, Ranks
from tests.support.backbones import Small

#: one of the three costs a second, the others nothing: seconds are then FLOPs, bytes or kernels
FLOPS, BYTES, KERNELS = (Rates(*(float(i == j) for j in range(3)), 0.0, "cpu") for i in range(3))
BOTH = Rates(5.8e-12, 6.7e-11, 1.3e-5, 0.0, "cpu")
ADAMW = {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}}


def table(graph: graphopt.Graph, value: Supervise, step: TimedStep, modules: int = 2) -> Table:
    return predicted_seconds(graph, value._builder(graph), step, limit=value.limit, modules=modules)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=16, num_heads=2, num_classes=5)


NETWORKS = {
    "resnet": (lambda: cifar.build("resnet8"), (3, 8, 8), {}, {}),
    "resnet, image decoder, bfloat16": (lambda: cifar.build("resnet8"), (3, 8, 8), {"decoder": "image"}, {"amp": "bfloat16"}),
    "vit": (vit, (3, 16, 16), {}, ADAMW),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_predictions_of_modules_add_up_to_the_forecast_of_a_step(name: str) -> None:
    make, input, options, training = NETWORKS[name]
    model: nn.Module = make()
    graph = graphopt.trace(model, input, compare=False)
    value = Supervise(modules=2, balance="time", **options)
    labels = [c.label for c in cut_candidates(graph)]
    at = len(labels) // 2
    plan = graphopt.compile(model, Supervise(cuts=[labels[at]], **options), input=input, verify="off", costs=False)
    step = forecast(plan.module, input, 16, targets=True, **training)
    # Above the point, seconds are FLOPs; below it bytes and kernels, as shares of those of the step.
    rates = Rates(1.0, 0.2 / step.moved_bytes, 0.1 / step.kernels, 0.0, "cpu")
    found = table(graph, value, TimedStep(16, lambda: rates, **training))
    flops, others = divmod(found[0, at] + found[at + 1, -1], 1)
    assert flops == step.flops
    # The network's own criterion is in no module. Under autocast, heads and decoders take a narrower input than here.
    assert others == pytest.approx(0.3, rel=0.05 if "amp" in training else 0.02)


class Uneven(nn.Module):
    """Four linear layers that take 1, 1, 2 and 4 parts of the FLOPs, but equally many kernels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 16, 16, 32, 32)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(x))


@pytest.mark.parametrize(("rates", "end"), [(FLOPS, "layers.2"), (KERNELS, "layers.1")])
def test_cuts_follow_the_rates(rates: Rates, end: str) -> None:
    graph = graphopt.trace(Uneven(), (16,))
    value = Supervise(modules=2, balance="time", decoder="none").settle(graph, TimedStep(64, lambda: rates))
    assert value.cuts is not None
    assert value.cuts[0].startswith(end)


def test_a_limit_holds_each_module_down_and_costs_time() -> None:
    graph = graphopt.trace(cifar.build("resnet14"), (3, 8, 8))
    step = TimedStep(64, lambda: BOTH)
    free, tight = (Supervise(modules=2, balance="time", decoder="none", limit=limit) for limit in (None, "3800 KiB"))
    assert free.settle(graph, step).cuts != tight.settle(graph, step).cuts
    with pytest.raises(
        PassError, match=r"no 2 modules keep their steps of 64 samples within 1\.00 MiB.*The lowest is 3\.\d+ MiB"
    ) as caught:
        Supervise(modules=2, balance="time", decoder="none", limit="1 MiB").settle(graph, step)
    assert caught.value.where == "limit"


def test_the_limit_is_about_what_a_process_with_one_module_holds() -> None:
    model = Small(drop=0.0)
    graph = graphopt.trace(model, (3, 8, 8))
    step = TimedStep(8, lambda: BOTH)
    with pytest.raises(PassError) as caught:
        Supervise(modules=4, balance="time", limit=1).settle(graph, step)
    assert caught.value.fix is not None
    lowest = float(caught.value.fix.split(" ")[3]) * 1024
    # Four modules hold as much as the one that is largest, with a quarter of the parameters.
    plan = graphopt.compile(model, Supervise(modules=4), input=(3, 8, 8), verify="off", costs=False)
    assert 0.6 < lowest / forecast(plan.module, (3, 8, 8), 8, targets=True).peak_bytes < 1.05


def test_an_unsettled_pass_chooses_no_cuts() -> None:
    value = Supervise(modules=2, balance="time")
    graph = graphopt.trace(Small(), (3, 8, 8))
    with pytest.raises(PassError, match="depends on the machine"):
        value.match(graph)
    found = value.settle(graph, TimedStep(8, lambda: BOTH))
    assert found.settles(value)
    assert not value.settles(found)
    assert found.settle(graph, TimedStep(8, lambda: FLOPS)) == found
    assert any("measured on a machine" in d.message for d in found.match(graph).diagnostics)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"balance": "time"}, "needs modules"),
        ({"balance": "time", "modules": 3, "cuts": ["blocks.0"]}, "modules = 3 has 2 cuts"),
        ({"modules": 3, "limit": "1 MiB"}, 'modules of balance = "time"'),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=says):
        Supervise(**options)


# -- once chosen, cuts stay -----------------------------------------------------------------------------------------------------
TABLE: dict[str, Any] = {
    "backbone": {"source": "cifar", "name": "resnet8", "arguments": {"in_chans": 1}, "input": [1, 8, 8]},
    "pass": [{"use": "supervise", "modules": 2, "balance": "time", "decoder": "none"}],
    "train": {"batch": 16, "device": "cpu"},
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Rates]:
    """The machine: the rates that it is measured to have, one after the other."""
    found: list[Rates] = []
    monkeypatch.setattr("graphopt.driver.rates_of", lambda *_: found.pop(0))
    return found


def test_a_plan_says_which_cuts_it_has_and_its_spec_keeps_them(machine: list[Rates]) -> None:
    machine += [FLOPS, KERNELS]
    spec = from_table(TABLE)
    plan, other = (graphopt.compile(None, spec, verify="off", costs=False) for _ in range(2))
    assert plan.report.passes[0].figures["cuts"] == list(plan.passes[0].cuts)
    assert plan.passes[0].cuts != other.passes[0].cuts
    assert plan.digest != other.digest
    again = graphopt.compile(None, loads(dumps(plan.spec)), verify="off", costs=False)
    assert (again.digest, again.passes) == (plan.digest, plan.passes)
    assert not machine, "it was measured for every spec without cuts, and for no other"


def test_passes_by_hand_are_settled_too(machine: list[Rates]) -> None:
    machine += [FLOPS, KERNELS]
    plans = [graphopt.compile(Small(), Supervise(modules=2, balance="time"), input=(3, 8, 8), verify="off", costs=False) for _ in range(2)]
    assert len({p.digest for p in plans}) == len({p.passes[0].cuts for p in plans})


def test_a_run_that_goes_on_keeps_its_cuts(machine: list[Rates], tmp_path: Path) -> None:
    machine += [FLOPS, KERNELS]
    spec = from_table(TABLE)
    begun = settled(spec, spec.train, tmp_path, ALONE, trust=False)
    (tmp_path / "spec.toml").write_text(dumps(begun))
    assert settled(spec, spec.train, tmp_path, ALONE, trust=False) == begun
    assert settled(begun, spec.train, tmp_path, ALONE, trust=False) is begun
    changed = from_table({**TABLE, "pass": [{**TABLE["pass"][0], "decoder": "features"}]})
    assert settled(changed, spec.train, tmp_path, ALONE, trust=False).passes != begun.passes
    assert not machine


def test_all_ranks_take_what_rank_0_measures(monkeypatch: pytest.MonkeyPatch, machine: list[Rates], tmp_path: Path) -> None:
    machine.append(FLOPS)
    spec = from_table(TABLE)
    first = settle(spec)
    monkeypatch.setattr(Ranks, "broadcast", lambda *_: dumps(first))
    assert settled(spec, TrainSpec(), tmp_path, Ranks(1, 2), trust=False) == first
