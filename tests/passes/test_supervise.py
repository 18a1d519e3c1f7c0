"""Supervise as a pass: where it cuts, what it refuses, what it says, and what it reaches."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pydantic
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphopt
from graphopt.compiler.triggers import Decision
from graphopt.cost import forecast
from graphopt.cost.partition import BATCH, best
from graphopt.errors import PassError, SelectError
from graphopt.ir.partition import cut_candidates, most_parts
from graphopt.models import cifar_resnet as cifar
from graphopt.passes.supervise import Supervise
from tests.passes.supervise_backbones import BACKBONES
from tests.passes.supervise_steps import compiled, step
from tests.support.backbones import Small


def labels(plan: graphopt.Plan) -> list[str]:
    return plan.report.passes[0].figures["cuts"]


# -- where it cuts --------------------------------------------------------------------------------------------------------------
EVENLY = [
    (lambda: cifar.build("resnet110"), (3, 32, 32), 2, ["layer2.8"]),  # InfoPro's even cuts: [2, 8]
    (lambda: cifar.build("resnet20"), (3, 32, 32), 3, ["layer1.2", "layer2.2"]),
    (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4), (3, 32, 32), 4, ["blocks.0", "blocks.1", "blocks.2"]),
    (lambda: timm.create_model("convnext_atto"), (3, 32, 32), 2, ["stages.2.blocks.1"]),
]


@pytest.mark.parametrize(("make", "input", "modules", "expected"), EVENLY)
def test_even_cuts_go_after_blocks(make: Any, input: tuple[int, ...], modules: int, expected: list[str]) -> None:
    graph = graphopt.trace(make(), input, compare=False)
    assert [c.label for c in Supervise(modules=modules).choose_cuts(graph)] == expected


WAYS: list[dict[str, Any]] = [
    {"modules": 3},
    {"modules": 3, "structure": "conv", "loss": "l2"},
    {"modules": 3, "structure": "conv", "fraction": 1.0},
    {"modules": 2, "structure": "transformer", "head": "contrast"},
    {"modules": 2, "decoder": "image"},
    {"modules": 3, "decoder": "none", "head": "conv"},
]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_in_several_ways(name: str) -> None:
    """The first way on all; of the others, each on several backbones."""
    make, input = BACKBONES[name]
    torch.manual_seed(0)
    model, start = make(), list(BACKBONES).index(name)
    for way in (WAYS[0], *(WAYS[1 + (start + k) % (len(WAYS) - 1)] for k in (0, 2))):
        plan = compiled(model, Supervise(**way), input, verify="fast")
        found = step(plan, input)
        assert [n for n, g in found.items() if g is None] == [], way
        assert all(g.isfinite().all() for g in found.values()), way


@pytest.mark.parametrize("name", ["resnet18", "vit", "swin, timm", "densenet"])
def test_any_number_of_modules_up_to_the_cut_points(name: str) -> None:
    make, input = BACKBONES[name]
    model = make()
    found = cut_candidates(graphopt.trace(model, input, compare=False))
    most = most_parts(found)
    plan = compiled(model, Supervise(modules=most), input, verify="fast")
    assert len(labels(plan)) == most - 1
    assert all(g is not None for g in step(plan, input).values())
    with pytest.raises(PassError, match=f"Ask for {most} or fewer") as caught:
        compiled(model, Supervise(modules=most + 1), input)
    assert found[0].label in str(caught.value)


def test_stages_end_where_resolution_changes() -> None:
    make, input = BACKBONES["swin, timm"]
    plan = compiled(make(), Supervise(balance="stage"), input)
    assert labels(plan) == ["layers.1.downsample", "layers.2.downsample"]
    assert labels(compiled(cifar.build("resnet20"), Supervise(balance="stage"), (3, 32, 32))) == ["layer1.2", "layer2.2"]
    assert labels(compiled(cifar.build("resnet20"), Supervise(balance="stage", modules=2), (3, 32, 32))) in (["layer1.2"], ["layer2.2"])


def test_no_stages_or_too_few_is_an_error() -> None:
    make, input = BACKBONES["vit"]
    with pytest.raises(PassError, match="there are no stages"):
        compiled(make(), Supervise(balance="stage"), input)
    with pytest.raises(PassError, match="there are 3 stages, not 4"):
        compiled(cifar.build("resnet20"), Supervise(balance="stage", modules=4), (3, 32, 32))


# -- explicit cuts and their errors ---------------------------------------------------------------------------------------------
def test_explicit_cuts_come_in_execution_order() -> None:
    assert labels(compiled(Small(), Supervise(cuts=["blocks.2", "blocks.0"]))) == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize(
    ("model", "named", "words"),
    [
        (Small, ["blocks.1.conv1"], "other paths go around it"),
        (Small, ["fc"], "it is the output"),
        (
            lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
            ["features.denseblock1.denselayer1"],
            "nearest cuts are after",
        ),
        (lambda: torchvision.models.resnet18(num_classes=10), ["bn1"], "overwrites its output in place"),
        (BACKBONES["vgg11_bn"][0], ["features.0", "features.0.nothing"], "no part of the graph|cannot be cut"),
    ],
)
def test_a_cut_that_is_none_names_the_nearest(model: Any, named: list[str], words: str) -> None:
    with pytest.raises((PassError, SelectError), match=words) as caught:
        compiled(model(), Supervise(cuts=named), (3, 32, 32))
    assert "nearest" in str(caught.value) or "Did you mean" in str(caught.value)


def test_a_backbone_without_a_cut_says_that_it_has_none() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    with pytest.raises(PassError, match="the backbone cannot be divided"):
        compiled(Whole(), Supervise(modules=2), (8,))


@pytest.mark.parametrize("function", [torch.relu_, F.relu_, F.leaky_relu_, lambda y: y.relu_(), lambda y: F.relu(y, inplace=True)])
def test_a_cut_whose_activation_is_overwritten_is_refused(function: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2, self.c3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.c3(self.c2(function(self.c1(x)))).mean((2, 3)))

    with pytest.raises(PassError, match="overwrites its output in place"):
        compiled(Net(), Supervise(cuts=["c1", "c2"], fraction=1.0))


def test_the_name_of_a_cut_in_the_report_is_accepted_as_a_cut() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(F.relu(self.stem(x))).mean((2, 3)))

    assert labels(compiled(Net(), Supervise(cuts=["(relu)"]))) == ["(relu)"]


def test_nothing_to_train_between_cuts_is_an_error() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(PassError, match="nothing to train between the cuts after 'relu' and 'maxpool'"):
        compiled(model, Supervise(cuts=["relu", "maxpool"]), (3, 32, 32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give modules = K"),
        ({"modules": 1}, "greater than or equal to 2"),
        ({"modules": 2, "cuts": ["blocks.0"]}, "leave out modules"),
        ({"cuts": ["blocks.0", "blocks.0"]}, "twice"),
        ({"modules": 2, "fraction": 0.0}, "greater than 0"),
        ({"modules": 2, "decoder": "image", "loss": "huber"}, "l1"),
        ({"modules": 2, "decoder": "none", "weights": {"classify": [0, 0]}}, "must not be 0"),
        ({"modules": 2, "module": 3}, "Extra inputs"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=words):
        Supervise(**options)


def test_a_decoder_that_does_not_fit_is_refused_with_what_would() -> None:
    class NoGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(x).relu()).mean(1))

    with pytest.raises(PassError, match=r'needs a map.*Use structure = "linear"'):
        compiled(NoGrid(), Supervise(cuts=["a"], structure="conv"), (7, 5))
    with pytest.raises(PassError, match="convolutional head needs a map"):
        compiled(NoGrid(), Supervise(cuts=["a"], head="conv"), (7, 5))
    assert step(compiled(NoGrid(), Supervise(cuts=["a"]), (7, 5)), (7, 5))["a.weight"] is not None


def test_an_output_without_classes_asks_for_them() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    with pytest.raises(PassError, match="Set classes"):
        compiled(Dense(), Supervise(cuts=["a"]))
    assert compiled(Dense(), Supervise(cuts=["a"], classes=7)).module.get_submodule("supervise.0").classes == 7


def test_a_dictionary_as_output_asks_for_classes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Small()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"logits": logits, "probabilities": logits.softmax(1)}

    with pytest.raises(PassError, match="Set classes"):
        compiled(Two(), Supervise(modules=2))
    plan = compiled(Two(), Supervise(modules=2, balance="memory", classes=10), verify="fast")
    output, local = plan.module.train()(torch.randn(4, 3, 8, 8), torch.arange(4))
    (output["logits"].sum() + local).backward()
    assert all(p.grad is not None for p in plan.module.parameters())


def test_image_statistics_must_have_the_images_channels() -> None:
    with pytest.raises(PassError, match="3 channels, mean has 1"):
        compiled(Small(), Supervise(modules=2, decoder="image", mean=[0.5]))


# -- balance --------------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("name", "modules"), [("resnet18", 2), ("swin, timm", 4), ("vit", 2), ("convnext", 4)])
def test_the_predicted_peak_is_the_forecasts(name: str, modules: int) -> None:
    make, input = BACKBONES[name]
    model = make()
    graph = graphopt.trace(model, input, compare=False)
    table = Supervise(modules=2, balance="memory").peaks(graph)
    assert table[0, -1] == pytest.approx(forecast(graph.module, input, BATCH).peak_activation_bytes, rel=0.06)
    predicted, _ = best(table, modules)
    cuts = [cut.label for cut in Supervise(modules=modules, balance="memory").choose_cuts(graph)]
    plan = compiled(model, Supervise(cuts=cuts), input, verify="off")
    assert predicted == pytest.approx(forecast(plan.module, input, BATCH, targets=True).peak_activation_bytes, rel=0.06)
    assert all(g is not None and g.isfinite().all() for g in step(plan, input).values())


@pytest.mark.usefixtures("traced_once")
def test_no_other_cut_set_forecasts_lower() -> None:
    model = Small(width=8, blocks=3, drop=0.0)
    graph = graphopt.trace(model, (3, 16, 16))
    found = cut_candidates(graph)
    peaks = {}
    for chosen in itertools.combinations([p.label for p in found], 2):
        try:
            plan = compiled(model, Supervise(cuts=[c.split(" ")[0] for c in chosen]), (3, 16, 16), verify="off")
        except (PassError, SelectError, pydantic.ValidationError):
            continue
        peaks[chosen] = forecast(plan.module, (3, 16, 16), BATCH, targets=True).peak_activation_bytes
    plan = compiled(model, Supervise(modules=3, balance="memory"), (3, 16, 16), verify="off")
    ours = forecast(plan.module, (3, 16, 16), BATCH, targets=True).peak_activation_bytes
    assert ours <= 1.03 * min(peaks.values())


def test_memory_without_a_number_chooses_one() -> None:
    plan = compiled(cifar.build("resnet20"), Supervise(balance="memory"), (3, 32, 32), costs=True)
    assert plan.report.passes[0].figures["modules"] >= 3
    assert plan.report.after.peak_activation_bytes < 0.5 * plan.report.before.peak_activation_bytes


# -- what it reaches ------------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "shares"), [("resnet110", {2: 0.55, 4: 0.30, 8: 0.17}), ("swin", {4: 0.34})])
def test_peak_activations_fall_as_far_as_promised(name: str, shares: dict[int, float]) -> None:
    model, input = {
        "resnet110": (cifar.build("resnet110"), (3, 32, 32)),
        "swin": (timm.create_model("swin_tiny_patch4_window7_224"), (3, 224, 224)),
    }[name]
    graph = graphopt.trace(model, input, compare=False)
    whole = forecast(graph.module, input, 128).peak_activation_bytes
    for modules, most in shares.items():
        cuts = [cut.label for cut in Supervise(modules=modules, balance="memory").choose_cuts(graph)]
        plan = compiled(model, Supervise(cuts=cuts), input, verify="off")
        assert forecast(plan.module, input, 128, targets=True).peak_activation_bytes <= most * whole, modules


def test_what_supervises_costs_no_memory_per_channel_and_sample() -> None:
    """A decoder's weight gradient is one, not one per sample: 64 of 512 x 512 would be 64 MiB here."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 512, 4, 4)
            self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(512, 512, 1), nn.ReLU()) for _ in range(4)])
            self.fc = nn.Linear(512, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    peaks = []
    for decoder in ("features", "none"):
        plan = compiled(Wide(), Supervise(modules=2, decoder=decoder), verify="off")
        peaks.append(forecast(plan.module, (3, 8, 8), 64, targets=True).peak_activation_bytes)
    assert peaks[0] < 1.5 * peaks[1]


# -- the report, TOML, phases ---------------------------------------------------------------------------------------------------
def test_the_report_says_where_it_cuts_and_what_it_adds() -> None:
    plan = compiled(Small(), Supervise(modules=2), costs=True)
    report = plan.report.passes[0]
    assert report.figures["cuts"] == ["blocks.1"]
    extra = sum(p.numel() for n, p in plan.module.named_parameters() if n.startswith("supervise."))
    assert report.figures["auxiliary_parameters"] == extra
    assert report.after.parameters - report.before.parameters == extra
    assert plan.needs.targets
    json.dumps(plan.report.to_dict())


def test_full_verification_passes() -> None:
    plan = compiled(Small(), Supervise(modules=3), verify="full")
    assert {c.property for c in plan.report.passes[0].verified} >= {"eval output"}


def test_the_report_names_the_modules_as_regions() -> None:
    plan = compiled(Small(), Supervise(cuts=["blocks.0", "blocks.2"]))
    assert plan.report.passes[0].regions == ("module 1 (to blocks.0)", "module 2 (to blocks.2)")
    statuses = plan.effects[0].statuses
    assert [statuses[f"supervise.{i}"].status for i in range(2)] == ["inserted", "inserted"]
    assert [statuses[f"supervise.{i}"].sources for i in range(2)] == [("blocks.0",), ("blocks.2",)]


def test_candidates_keep_the_other_options() -> None:
    graph = graphopt.trace(Small(), (3, 8, 8))
    found = list(Supervise.candidates(graph, Supervise(cuts=["blocks.2"], decoder="none")))
    assert [c.label for c in found][:2] == ["supervise, 2 modules", "supervise, 3 modules"]
    assert found[0].value.table() == {"use": "supervise", "modules": 2, "balance": "memory", "decoder": "none"}
    assert all(c.value.decoder == "features" for c in Supervise.candidates(graph, None))


def test_weights_run_linearly_from_the_first_module_to_the_last() -> None:
    plan = compiled(Small(), Supervise(modules=4, weights={"reconstruct": (1.0, 0.0), "classify": (0.0, 2.0)}))
    parts = [plan.module.get_submodule(f"supervise.{i}") for i in range(3)]
    assert [p.weights.reconstruct for p in parts] == [1.0, 0.5, 0.0]
    assert [p.weights.classify for p in parts] == [0.0, 1.0, 2.0]
    # What has no weight is not built.
    assert parts[0].head is None
    assert parts[2].decoder is None
    assert all(g is not None for g in step(plan).values())


def test_another_seed_gives_other_auxiliary_weights_and_leaves_the_stream_alone() -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = Small()
        plan = compiled(model, Supervise(modules=2), verify="off")
        found.append((plan.module.get_parameter("supervise.0.decoder.fc.weight").detach(), torch.rand(())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_from_an_epoch_on_and_back() -> None:
    plan = compiled(Small(drop=0.0), Supervise(modules=2, when={"epoch": 1, "until": 2}), verify="fast")
    x = torch.randn(2, 3, 8, 8)
    assert isinstance(plan.module.train()(x), Tensor)
    later = plan.advance_to([Decision(index=0, epoch=1)])
    assert len(later.module.train()(x, torch.zeros(2, dtype=torch.long))) == 2
    after = later.advance_to([Decision(index=0, epoch=1), Decision(index=0, epoch=2, action="undo")])
    assert torch.equal(after.module.eval()(x), later.module.eval()(x))
    assert after.module.state_dict().keys() == Small().state_dict().keys()
