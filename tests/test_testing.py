"""`check_pass` accepts passes that keep their word, and says which word another one broke."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import ActiveMatch, Editor, Effects, Match
from graphopt.errors import PassError, VerifyError
from graphopt.passes.freeze import Freeze
from graphopt.passes.supervise import Supervise
from graphopt.testing import check_pass
from tests.support.backbones import Small

README = (Path(__file__).parents[1] / "README.md").read_text()
SMALL = {"small": (Small(blocks=2, drop=0.0), (3, 8, 8))}
CHECKS = ["keeps what it declares", "computes as the backbone", "trains 2 steps", "leaves the model as it was"]
CHECKS += ["leaves what is frozen as it was", "survives a deep copy", "goes through a file", "goes on from a checkpoint"]
CHECKS += ["costs what is forecast", "exports to the backbone"]


def test_the_pass_of_the_readme_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(text for text in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if "class Damp" in text)
    (tmp_path / "readme_damp.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    report = check_pass(import_module("readme_damp").Damp(select="layer2"))
    assert [f.check for f in report.findings] == CHECKS
    assert {f.backbone for f in report.findings} == {"resnet"}, "a vision transformer has no layer2"
    assert "resnet: keeps what it declares: ok (" in str(report)
    assert "eval output" in str(report)


def test_passes_together_are_checked_in_every_phase() -> None:
    late = Freeze.model_validate({"select": {"blocks": True, "first": 1}, "when": {"epoch": 2}})
    report = check_pass([late, Supervise(modules=2)], SMALL)
    later = [CHECKS[0], "carries the weights over", *CHECKS[1:]]
    assert [(f.epoch, f.check) for f in report.findings] == [*((0, check) for check in CHECKS), *((2, check) for check in later)]
    assert "small, from epoch 2: trains 2 steps: ok" in str(report)


class _Broken(graphopt.Pass):
    """One fault at a time, in the first block."""

    name: ClassVar[str] = "broken"
    fault: str

    def match(self, graph: graphopt.Graph) -> Match[None]:
        return Match(graphopt.select("blocks.0", graph))

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        effects = Effects()
        leaf = next(n for n in match.regions[0].nodes if str(n.target) == "blocks.0.conv1")
        makers = {"copy": _Counting, "checkpoint": _Remembering, "export": _Doubled, "cost": _Hidden}
        if self.fault in makers:
            edit.redirect(leaf, edit.call_module("blocks.0.extra", makers[self.fault](), (leaf,), after=leaf))
        return effects


class _Counting(nn.Module):
    """Its output depends on how often any copy of it has run."""

    calls: ClassVar[list[int]] = [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls[0] += 1
        return x * (1 + 0.01 * self.calls[0]) if self.training else x


class _Remembering(nn.Module):
    """Its output depends on how often it has run, which no state dict says."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + 0.01 * self.calls) if self.training else x


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1


class _Hidden(nn.Module):
    """Allocates where no forecast can see it coming: twice as much for real tensors."""

    def forward(self, x: Tensor) -> Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        return x if isinstance(x, FakeTensor) else (x.exp() + x.exp()).log() - 0.6931


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("copy", "survives a deep copy", "deep copy"),
        ("checkpoint", "goes on from a checkpoint", "a run from the checkpoint"),
        ("export", "exports to the backbone", "computes something else"),
        ("cost", "costs what is forecast", "measured"),
    ],
)
def test_what_is_broken_is_named(fault: str, check: str, words: str) -> None:
    with pytest.raises(VerifyError) as caught:
        check_pass(_Broken(fault=fault), SMALL)
    lines = [line for line in str(caught.value).splitlines() if "FAILED" in line]
    assert any(line.startswith(f"small: {check}: FAILED: ") and words in line for line in lines), str(caught.value)


def test_a_property_that_does_not_hold_is_named() -> None:
    class Lying(_Broken):
        name: ClassVar[str] = "lying"
        preserves = frozenset({"eval output"})

    with pytest.raises(VerifyError, match="small: keeps what it declares: FAILED"):
        check_pass(Lying(fault="export"), SMALL)


def test_a_pass_that_fits_no_backbone_says_why() -> None:
    with pytest.raises(PassError, match=r"freeze: it does not fit: .*nowhere.*backbones="):
        check_pass(Freeze(select="nowhere"))
    with pytest.raises(PassError, match="small: "):
        check_pass(Freeze(select="layer1"), SMALL)


def test_the_generator_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_pass(Freeze(select="blocks.0"), SMALL)
    assert torch.equal(torch.rand(1), expected)
