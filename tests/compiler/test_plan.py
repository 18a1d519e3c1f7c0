"""compile, phases, verification, conflicts, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt import Decision, Filter, PassError, SelectError, SpecError, VerifyError
from graphopt.compiler.triggers import AtEpoch
from graphopt.ir.regions import region_of
from tests.support.backbones import Small
from tests.support.passes import Fails, Gone, Liar, Outline, Recompute, Still

SHAPE = (3, 8, 8)


def compiled(*passes: graphopt.Pass, model: nn.Module | None = None, **options: Any) -> graphopt.Plan:
    return graphopt.compile(model or Small(), passes, input=SHAPE, costs=False, **options)


def test_a_plan_without_passes_is_the_backbone() -> None:
    model = Small()
    plan = compiled(model=model)
    x = torch.rand(4, *SHAPE)
    assert torch.equal(plan.module.eval()(x), model.eval()(x))
    assert type(plan.export()) is Small


def test_the_callers_model_shares_nothing_with_the_plan() -> None:
    model = Small()
    plan = compiled(Still(), model=model)
    assert all(p.requires_grad for p in model.parameters())
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in plan.module.parameters())


def test_trained_weights_come_back_under_the_original_keys() -> None:
    model = Small()
    plan = compiled(Outline(), Still(select="stem"), model=model)
    optimizer = torch.optim.SGD([p for p in plan.module.parameters() if p.requires_grad], lr=0.1)
    x = torch.rand(4, *SHAPE)
    plan.module.train()(x).square().sum().backward()
    optimizer.step()
    back = plan.export()
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back.stem.weight, model.stem.weight)
    assert not torch.equal(back.fc.weight, model.fc.weight)
    assert torch.equal(back(x), plan.module.eval()(x))
    assert all(p.requires_grad for p in back.parameters())


def test_a_deep_copy_is_independent_and_equal() -> None:
    plan = compiled(Outline())
    twin = copy.deepcopy(plan.module)
    x = torch.rand(4, *SHAPE)
    assert torch.equal(twin.eval()(x), plan.module.eval()(x))
    with torch.no_grad():
        twin.get_parameter("blocks.0.conv1.weight").zero_()
    assert not torch.equal(twin(x), plan.module(x))
    assert twin.train().get_submodule("blocks.0.bn1").training


def test_sections_do_not_register_parameters_twice() -> None:
    plan = compiled(Outline())
    names = [n for n, _ in plan.module.named_parameters(remove_duplicate=False)]
    assert names == [n for n, _ in Small().named_parameters()]


def test_sections_nest_and_follow_the_mode() -> None:
    plan = compiled(Outline(select="blocks"), Outline(select="blocks.1"))
    plan.module.eval()
    assert not any(m.training for m in plan.module.modules())
    plan.module.train()
    assert all(m.training for m in plan.module.modules())
    plan.module(torch.rand(2, *SHAPE)).sum().backward()
    assert all(p.grad is not None for p in plan.module.parameters())


class Runs(Outline):
    """Outlines two runs of blocks that overlap."""

    with_loss: bool = False

    def match(self, graph: graphopt.Graph) -> graphopt.Match[None]:
        return graphopt.Match((region_of(graph, ("blocks.0", "blocks.1")), region_of(graph, ("blocks.1", "blocks.2"))))

    def edit(self, edit: graphopt.Editor, region: Any) -> None:
        edit.outline(region.nodes, Recompute, "run", target=self.with_loss)


def test_overlapping_sections_are_divided() -> None:
    plan = compiled(Runs())
    held = [{".".join(n.meta["origin"].path.split(".")[:2]) for n in s.nodes} for s in plan.graph.sections]
    assert held == [{"blocks.0", "blocks.1"}, {"blocks.1"}, {"blocks.2"}]


def test_overlapping_sections_with_local_losses_name_their_passes() -> None:
    with pytest.raises(PassError, match=r"pass 1 \(outline\).*overlap"):
        compiled(Runs(with_loss=True), verify="off")


@pytest.mark.parametrize("about", ["eval output", "training output", "state-dict keys", "gradients of unselected parameters"])
def test_a_broken_promise_is_found_and_named(about: str) -> None:
    with pytest.raises(VerifyError, match=about if about != "gradients of unselected parameters" else "gradient of") as caught:
        compiled(Outline(), Liar(select="blocks.2", about=about))
    assert "pass 2, liar" in str(caught.value)
    assert caught.value.exit_code == 1


def test_verification_can_be_turned_off() -> None:
    assert compiled(Liar(), verify="off").report.passes[0].verified == ()


def test_what_was_verified_is_reported() -> None:
    (report,) = compiled(Outline()).report.passes
    found = {c.property: c.difference for c in report.verified}
    assert found["eval output"] == 0.0
    assert found["training output"] == 0.0
    assert "gradients of unselected parameters" in found


def test_no_trainable_parameter_left_is_said() -> None:
    with pytest.raises(VerifyError, match="no trainable parameter"):
        compiled(Still(select="**"))


def test_a_failing_rewrite_leaves_the_model_alone() -> None:
    model = Small()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        compiled(Fails(), model=model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_conflicts_surface_before_any_rewrite() -> None:
    with pytest.raises(PassError, match=r"blocks\.1.*cannot be gone and still"):
        compiled(Fails(), Gone(select="blocks.1"), Still(select="blocks"))


def test_errors_carry_the_pass() -> None:
    with pytest.raises(SelectError, match=r"pass 2, still.*blocks\.9"):
        compiled(Outline(), Still(select="blocks.9"))


def test_passes_alone_need_a_model_and_an_input() -> None:
    with pytest.raises(SpecError, match="input="):
        graphopt.compile(Small(), [Outline()])


# -- phases ---------------------------------------------------------------------------------------------------------------------


def test_decisions_alone_make_a_phase() -> None:
    plan = compiled(Still(select="blocks.0", when=AtEpoch(epoch=2, until=4)), Still(select="stem", when=AtEpoch(epoch=3)))
    frozen = {}
    for epoch in range(6):
        plan = plan.advance_to(plan.decisions + plan.due(epoch))
        frozen[epoch] = {
            n.split(".conv")[0].split(".bn")[0].split(".weight")[0].split(".bias")[0]
            for n, p in plan.module.named_parameters()
            if not p.requires_grad
        }
    assert frozen == {0: set(), 1: set(), 2: {"blocks.0"}, 3: {"blocks.0", "stem"}, 4: {"stem"}, 5: {"stem"}}
    assert [(d.index, d.epoch, d.action) for d in plan.decisions] == [(0, 2, "apply"), (1, 3, "apply"), (0, 4, "undo")]


def test_weights_and_statistics_cross_a_phase() -> None:
    plan = compiled(Gone(select="blocks.1", when=AtEpoch(epoch=1)))
    plan.module.train()(torch.rand(8, *SHAPE))
    with torch.no_grad():
        for parameter in plan.module.parameters():
            parameter.add_(0.1)
    later = plan.advance_to([Decision(index=0, epoch=1)])
    for key, value in plan.module.state_dict().items():
        assert torch.equal(later.module.state_dict()[key], value), key
    assert any(n.startswith("blocks.1.") for n, _ in later.module.named_parameters())


# -- composition ----------------------------------------------------------------------------------------------------------------

_region = st.sampled_from(["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"])
_pass = st.one_of(
    st.builds(lambda r: Outline(select=r), _region),
    st.builds(lambda r: Still(select=r), _region),
    st.builds(lambda n: Outline(select=Filter(blocks=True, first=n)), st.integers(1, 4)),
)


@settings(max_examples=15)
@given(st.lists(_pass, max_size=3, unique_by=str))
def test_passes_that_preserve_the_output_preserve_it_together(passes: list[graphopt.Pass]) -> None:
    torch.manual_seed(0)
    model = Small()
    plan = compiled(*passes, model=model, verify="fast")
    x = torch.rand(2, *SHAPE)
    outputs = []
    for module in (copy.deepcopy(model), plan.module):
        torch.manual_seed(1)
        outputs.append(module.train()(x))
    assert torch.equal(*outputs)


def test_a_backbone_whose_state_dict_has_a_version_is_exported() -> None:
    model = torchvision.models.mnasnet0_5(num_classes=3)
    plan = graphopt.compile(model, [], input=(3, 32, 32), verify="off", costs=False)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plan.export()(x), model.eval()(x))
