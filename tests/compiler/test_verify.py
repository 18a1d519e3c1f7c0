"""What verification finds: passes that are wrong in one way only, and every shortcut that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import Editor, VerifyError
from graphopt.compiler.runs import Runs
from graphopt.compiler.verify import Property
from graphopt.ir.shapes import smaller_input
from graphopt.passes.freeze import Freeze
from tests.support.backbones import Small
from tests.support.passes import Outline, Selecting

#: no shortcut is taken on it, and a smaller image is run for it
PLAIN, WIDE = (3, 8, 8), (3, 72, 72)
GRADIENTS: Property = "gradients of unselected parameters"


class InTraining(nn.Module):
    """Changes its input in train mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.001 if self.training else x


class Unrecorded(nn.Module):
    """Changes its input where no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return x if torch.is_grad_enabled() else x * 1.001


class Scaled(torch.autograd.Function):
    """Passes its input on, and scales the gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


class ScaledGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x)  # type: ignore[no-any-return]  # autograd functions have no types


class Cropped(nn.Module):
    """Cuts what a small image has not."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :64, :64]


class Resized(nn.Module):
    """Passes on what has 72 positions a side; changes anything smaller."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(72, 72), mode="bilinear", align_corners=True).tanh() if x.shape[-1] != 72 else x


class OnWhole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] >= 72, "too small"
        return x


class Wrong(Selecting):
    """Does `deed` to a region, and promises `about`."""

    name: ClassVar[str] = "wrong"
    about: Property = "eval output"
    deed: str = "weight"

    def preserved_properties(self) -> frozenset[Property]:
        return frozenset({self.about})

    def edit(self, edit: Editor, region: Any) -> None:
        DEEDS[self.deed](edit, region)


def _after(make: Callable[[], nn.Module]) -> Callable[[Editor, Any], None]:
    def insert(edit: Editor, region: Any) -> None:
        exit_ = region.exits[0]
        readers = tuple(exit_.users)
        new = edit.call_module("inserted", make(), (exit_,), after=exit_)
        edit.redirect(exit_, new, readers)

    return insert


def _change(name: str) -> Callable[[Editor, Any], None]:
    def change(edit: Editor, region: Any) -> None:
        values = edit.graph.module.state_dict()
        next(v for k, v in values.items() if k.startswith(region.name) and k.endswith(name)).data.mul_(1.001).add_(1e-3)

    return change


DEEDS: dict[str, Callable[[Editor, Any], None]] = {
    "weight": _change(".weight"),
    "statistic": _change("running_mean"),
    "training": _after(InTraining),
    "unrecorded": _after(Unrecorded),
    "gradient": _after(ScaledGradient),
    "crop": _after(Cropped),
    "resize": _after(Resized),
    "whole": _after(OnWhole),
    "nothing": _after(nn.Identity),
}
FOUND: list[tuple[str, Property, str]] = [
    ("weight", "eval output", "eval output is not preserved"),
    ("weight", "training output", "training output is not preserved"),
    ("weight", GRADIENTS, "the gradient of .* is not preserved"),
    ("weight", "state-dict keys", "changed the values"),
    ("statistic", "eval output", "eval output is not preserved"),
    ("statistic", GRADIENTS, "the gradient of .* is not preserved"),
    ("statistic", "state-dict keys", "changed the values"),
    ("training", "training output", "training output is not preserved"),
    ("unrecorded", "eval output", "eval output is not preserved"),
    ("gradient", GRADIENTS, "the gradient of .* is not preserved"),
]


def verified(*passes: graphopt.Pass, input: tuple[int, ...]) -> graphopt.Plan:
    torch.manual_seed(0)
    return graphopt.compile(Small(width=4, blocks=2), passes, input=input, costs=False)


@pytest.mark.parametrize("input", [PLAIN, WIDE], ids=["plain", "wide"])
@pytest.mark.parametrize(("deed", "about", "found"), FOUND)
def test_a_pass_that_is_wrong_in_one_way_is_found(deed: str, about: Property, found: str, input: tuple[int, ...]) -> None:
    with pytest.raises(VerifyError, match=found):
        verified(Wrong(select="blocks.0", deed=deed, about=about), input=input)


@pytest.mark.parametrize(("deed", "about", "found"), FOUND)
def test_it_is_found_after_a_pass_whose_runs_are_used_again(deed: str, about: Property, found: str) -> None:
    with pytest.raises(VerifyError, match=f"pass 2, wrong.*{found}"):
        verified(Outline(), Wrong(select="blocks.1", deed=deed, about=about), input=PLAIN)


@pytest.mark.parametrize(
    ("deed", "kept"),
    [
        ("training", "eval output"),
        ("training", GRADIENTS),
        ("unrecorded", GRADIENTS),
        ("gradient", "eval output"),
        ("gradient", "training output"),
    ],
)
def test_another_promise_is_kept_all_the_same(deed: str, kept: Property) -> None:
    verified(Wrong(select="blocks.0", deed=deed, about=kept), input=PLAIN)


def test_what_shows_on_the_whole_image_only_is_found() -> None:
    with pytest.raises(VerifyError, match="eval output"):
        verified(Wrong(select="stem", deed="crop", about="eval output"), input=WIDE)


@pytest.mark.parametrize("about", ["eval output", "training output", GRADIENTS])
@pytest.mark.parametrize("deed", ["resize", "whole", "nothing"])
def test_a_pass_that_is_right_on_the_whole_image_is_right(deed: str, about: Property) -> None:
    verified(Wrong(select="blocks.0", deed=deed, about=about), input=WIDE)


def test_a_network_that_takes_no_smaller_image_is_compared_on_its_own() -> None:
    model = nn.Sequential(Small(width=4, blocks=2).stem, OnWhole(), nn.Flatten(1), nn.LazyLinear(3))
    model(torch.zeros(2, *WIDE))
    for deed, about, found in FOUND:
        if deed in ("gradient", "training"):
            with pytest.raises(VerifyError, match=found):
                graphopt.compile(model, [Wrong(select="0", deed=deed, about=about)], input=WIDE, costs=False)


def test_a_run_is_done_once_and_leaves_the_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runs, calls = Runs(model, PLAIN, None), []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x, forward=nn.Conv2d.forward: calls.append(0) or forward(self, x))
    first = runs.computed(PLAIN, torch.float32, training=True)
    assert runs.computed(PLAIN, torch.float32, training=True) is first
    found = runs.computed(PLAIN, torch.float32, gradients=True)
    assert runs.known(PLAIN, torch.float32, training=False) is found
    assert len(calls) == 2
    assert found.gradients is not None
    assert found.gradients.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_held_values_are_those_of_before() -> None:
    model = nn.Conv2d(3, 4, 3)
    runs = Runs(model, PLAIN, None)
    expected = Runs(model, PLAIN, None).computed(PLAIN, torch.float64).outputs[0]
    runs.hold()
    model.weight.data.zero_()
    assert torch.equal(runs.computed(PLAIN, torch.float64).outputs[0], expected)


@pytest.mark.parametrize(
    ("input", "stride", "smaller"),
    [((3, 72, 72), 1, (3, 2, 2)), ((3, 96, 72), 4, (3, 11, 8)), ((3, 64, 64), 1, None), ((3, 72, 72), 36, None)],
)
def test_the_smaller_image_leaves_two_positions(input: tuple[int, ...], stride: int, smaller: tuple[int, ...] | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=stride, padding=1), nn.AdaptiveAvgPool2d(1))
    assert smaller_input(graphopt.trace(model, input, compare=False).nodes, input) == smaller


class Typed(nn.Sequential):
    """Takes its input in a type that its forward names."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        self.dtype = dtype
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype))


def test_a_network_that_asks_for_float64_is_verified_in_it() -> None:
    graphopt.compile(Typed(torch.float64), [Freeze(select="0")], input=(6,), verify="full")
    with pytest.raises(VerifyError, match="gradient"):
        graphopt.compile(Typed(torch.float64), [Wrong(select="1", deed="gradient", about=GRADIENTS)], input=(6,), verify="full")


def test_a_network_that_asks_for_another_type_says_so() -> None:
    with pytest.raises(VerifyError, match="compared in float32, where its forward fails"):
        graphopt.compile(Typed(torch.bfloat16), [Freeze(select="0")], input=(6,), verify="full", costs=False)


def test_an_error_without_a_message_is_named_by_its_kind() -> None:
    class Silent(Typed):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float32:
                raise RuntimeError
            return super().forward(x)

    with pytest.raises(VerifyError, match="where its forward fails"):
        Runs(Silent(torch.bfloat16), (6,), None).computed((6,), torch.float32)
