"""Sharing with everything around it: other passes, phases, copies, compilation, autocast, ranks, and a whole run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt import Decision, PassError, Plan
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.plan_file import is_plan_file
from graphopt.train import export_run, train
from tests.passes.share.backbones import family
from tests.support.backbones import Small
from tests.support.ranks import run_ranks
from tests.train import small

BOTH = pytest.mark.parametrize("mode", ["mix", "surrogate"])
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def planned(*passes: Any, model: nn.Module | None = None, verify: Any = "full") -> Plan:
    torch.manual_seed(0)
    return graphopt.compile(model or CifarResNet(20), list(passes), input=(3, 8, 8), verify=verify, costs=False)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(X).square().sum().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@BOTH
def test_a_neighbour_frozen_later(mode: str) -> None:
    plan = planned(Share(select="layer1.1", mode=mode), Freeze(select="layer1.2", when={"epoch": 2}))
    with torch.no_grad():
        plan.module.get_parameter("layer1.1.share.a").fill_(0.8)
    later = plan.advance_to([Decision(index=1, epoch=2)])
    assert later.module.get_parameter("layer1.1.share.a").item() == pytest.approx(0.8)
    found = gradients(later.module.eval())
    assert not any(n.startswith("layer1.2.") for n in found), "a frozen neighbour gets no gradient through the mix either"
    assert {"layer1.1.share.a", "layer1.1.share.b", "layer1.0.conv2.weight"} <= found.keys()
    torch.testing.assert_close(later.module.eval()(X), plan.module.eval()(X))


@pytest.mark.parametrize("order", [1, -1])
def test_a_shared_block_frozen_itself(order: int) -> None:
    passes = [Share(select="layer1.1"), Freeze(select="layer1.1")][::order]
    plan = planned(*passes)
    found = gradients(plan.module.eval())
    assert not any(n.startswith("layer1.1.") for n in found)
    assert {"layer1.0.conv1.weight", "layer1.2.conv1.weight"} <= found.keys()
    warnings = [d.message for r in plan.report.passes for d in r.diagnostics if d.severity == "warning" and d.location == "layer1.1"]
    # Shared first, its weights move with its neighbours'; frozen first, it is not shared.
    expected = "layer1.0.conv1.weight, which" if order == 1 else "keeps its own weights"
    assert any(expected in w for w in warnings)


def test_a_shared_block_frozen_with_its_neighbours_does_not_move() -> None:
    plan = planned(Freeze(select="layer1"), Share(select="layer1.1"))
    assert not any(d.severity == "warning" and "moves" in d.message for r in plan.report.passes for d in r.diagnostics)
    before = plan.export_state()
    plan.module.train()
    optimizer = torch.optim.SGD([p for p in plan.module.parameters() if p.requires_grad], lr=0.1)
    plan.module(X).square().sum().backward()
    optimizer.step()
    after = plan.export_state()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("layer1."))


def test_a_shared_block_frozen_with_all_before_it_says_what_moves() -> None:
    """Nothing before it trains; what it reads of the block behind it does."""
    plan = planned(Share(select="layer1.1"), Freeze(select=("conv1", "bn1", "layer1.0", "layer1.1")))
    found = [d.message for d in plan.report.passes[1].diagnostics if d.severity == "warning" and d.location == "layer1.1"]
    assert found
    assert all("layer1.2." in message and "before it" not in message for message in found)
    assert "layer1.2.conv1.weight" in gradients(plan.module.eval())


@BOTH
def test_a_block_that_is_frozen_before_keeps_its_weights(mode: str) -> None:
    plan = planned(Freeze(select="layer1.1"), Share(select="layer1.1", mode=mode))
    before = {k: v.clone() for k, v in plan.export_state().items() if k.startswith("layer1.1.")}
    optimizer = torch.optim.SGD([p for p in plan.module.parameters() if p.requires_grad], 0.1)
    torch.nn.functional.cross_entropy(plan.module.train()(X), torch.arange(len(X))).backward()
    optimizer.step()
    after = plan.export_state()
    assert all(torch.equal(after[k], before[k]) for k in before)
    warning = "warning layer1.1: it is frozen, so it keeps its own weights: a mix would move with its neighbours"
    assert warning in map(str, plan.report.passes[1].diagnostics)
    assert plan.report.passes[1].figures["shared"] == 0


def test_mixed_norms_of_a_frozen_block_use_their_running_statistics_in_both_modes() -> None:
    plan = planned(Freeze(select="layer1.1"), Share(select="layer1.1", norm="mix"))
    statistics = plan.module.get_buffer("layer1.1.bn1.running_mean").clone()
    plan.module.train()(X)
    assert torch.equal(plan.module.get_buffer("layer1.1.bn1.running_mean"), statistics)
    assert not torch.equal(plan.module.get_buffer("layer1.0.bn1.running_mean"), statistics)


def test_the_report_warns_of_a_frozen_source() -> None:
    plan = planned(Freeze(select="layer1.2"), Share(select="layer1.1"))
    expected = "warning layer1.1: its neighbour layer1.2 is frozen: of that part of the mix only the scalar trains"
    assert expected in map(str, plan.report.passes[1].diagnostics)


@BOTH
@pytest.mark.parametrize("order", [1, -1])
def test_inside_a_section_that_runs_as_a_unit(mode: str, order: int) -> None:
    passes = [Share(select="layer1.1", mode=mode), Checkpoint(select="layer1")][::order]
    plan, alone = planned(*passes), planned(passes[0 if order > 0 else 1])
    one, other = gradients(plan.module.train()), gradients(alone.module.train())
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"modules": 2}, {"modules": 3}])
def test_under_local_supervision(options: dict[str, Any]) -> None:
    supervise = pytest.importorskip("graphopt.passes.supervise")
    for passes in ([Share(every=2), supervise.Supervise(**options)], [supervise.Supervise(**options), Share(every=2)]):
        plan = planned(*passes, verify="fast")
        output, local = plan.module.train()(X, torch.arange(4))
        (output.square().mean() + local).backward()
        for name, parameter in plan.module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_two_passes_share_blocks_that_do_not_touch() -> None:
    model, shape, _ = family("timm ViT")
    first, second = Share(select="blocks.1"), Share(select="blocks.3", parts="mlp")
    plan = graphopt.compile(model, [first, second], input=shape, costs=False)
    plan.export()
    with pytest.raises(PassError, match=r"it needs layer1\.1\..*, which an earlier pass has replaced"):
        planned(Share(select="layer1.1"), Share(select="layer1.2", boundary="one-sided"))


def test_a_weight_that_an_earlier_mix_uses_outlives_its_block() -> None:
    model, shape, _ = family("timm ViT")
    passes = [Share(select="blocks.1", parts="mlp"), Share(select="blocks.2", mode="surrogate", boundary="nearest")]
    plan = graphopt.compile(model, passes, input=shape, costs=False)
    state = plan.module.state_dict()
    assert {"blocks.2.mlp.fc1.weight", "blocks.2.mlp.fc1.bias"} <= state.keys()
    assert not any(k.startswith("blocks.2.attn.") for k in state if "share" not in k and "norm" not in k)


def test_a_block_is_shared_once() -> None:
    with pytest.raises(PassError, match=r"layer1\.1: an earlier pass has replaced or removed what it would share"):
        planned(Share(select="layer1.1"), Share(select="layer1.1"))


# -- phases ---------------------------------------------------------------------------------------------------------------------
def test_a_mix_can_begin_late_and_be_taken_back() -> None:
    plan = planned(Share(select="layer1.1", when={"epoch": 1, "until": 3}))
    assert "layer1.1.conv1.weight" in plan.module.state_dict()
    shared = plan.advance_to(plan.due(1))
    assert "layer1.1.conv1.weight" not in shared.module.state_dict()
    with torch.no_grad():
        shared.module.get_parameter("layer1.1.share.a").fill_(0.9)
        shared.module.get_parameter("layer1.0.conv1.weight").add_(0.1)
    back = shared.advance_to((*shared.decisions, *shared.due(3)))
    state = back.module.state_dict()
    expected = 0.9 * state["layer1.0.conv1.weight"] + 0.5 * state["layer1.2.conv1.weight"]
    torch.testing.assert_close(state["layer1.1.conv1.weight"], expected)


def test_a_surrogate_stays_through_the_phases_of_others() -> None:
    passes = [Share(select="layer1.1", mode="surrogate"), Share(select="layer3.2", when={"epoch": 1, "until": 2})]
    plan = planned(*passes, model=CifarResNet(32))
    with torch.no_grad():
        plan.module.get_parameter("layer1.1.share.a").fill_(0.9)
    later = plan.advance_to([Decision(index=1, epoch=1)])
    back = later.advance_to([Decision(index=1, epoch=1), Decision(index=1, epoch=2, action="undo")])
    state = back.module.state_dict()
    assert state["layer1.1.share.a"].item() == pytest.approx(0.9)
    expected = 0.5 * state["layer3.1.conv1.weight"] + 0.5 * state["layer3.3.conv1.weight"]
    torch.testing.assert_close(state["layer3.2.conv1.weight"], expected)


@BOTH
def test_a_run_resumes_bit_for_bit_and_exports(tmp_path: Path, mode: str) -> None:
    def plan() -> Plan:
        torch.manual_seed(0)
        return graphopt.compile(Small(), Share(select="blocks.1", mode=mode), input=small.SHAPE, verify="off", costs=False)

    train(plan(), tmp_path / "whole", settings=small.settings(epochs=2, ema=0.9), data=small.interrupting(10**9))
    with pytest.raises(graphopt.train.Stopped):
        train(plan(), tmp_path / "cut", settings=small.settings(epochs=2, ema=0.9), data=small.interrupting(120))
    train(plan(), tmp_path / "cut", settings=small.settings(epochs=2, ema=0.9), data=small.interrupting(10**9), resume=True)
    assert small.same(small.weights(tmp_path / "whole"), small.weights(tmp_path / "cut"))
    written = export_run(tmp_path / "whole", tmp_path / "model.safetensors", which="last", weights="model", plan=plan())
    if mode == "surrogate":
        assert is_plan_file(written)
        model = graphopt.load(written, plan=plan())
    else:
        from safetensors.torch import load_file

        model = Small()
        model.load_state_dict(load_file(written), strict=True)
    trained = plan()
    trained.module.load_state_dict(small.weights(tmp_path / "whole"))
    torch.testing.assert_close(model.eval()(X), trained.module.eval()(X))


# -- the emitted module -----------------------------------------------------------------------------------------------------------
@BOTH
def test_copies_are_apart(mode: str) -> None:
    plan = planned(Share(every=2, mode=mode))
    duplicate = copy.deepcopy(plan.module)
    expected = gradients(plan.module.eval())
    with torch.no_grad():
        plan.module.get_parameter("layer1.0.conv2.weight").zero_()
    for name, value in gradients(duplicate.eval()).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(("mode", "name"), [("mix", "CIFAR ResNet"), ("surrogate", "torchvision ViT")])
def test_compiled_whole(mode: str, name: str) -> None:
    model, shape, _ = family(name)
    plan = graphopt.compile(model, Share(every=2, mode=mode), input=shape, verify="off", costs=False)
    x = torch.rand(2, *shape)
    module = plan.module.eval()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = module(x)
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    got = compiled(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    for key, value in wanted.items():
        torch.testing.assert_close(module.get_parameter(key).grad, value, rtol=1e-3, atol=1e-4)


@BOTH
def test_autocast(mode: str) -> None:
    plan = planned(Share(every=2, mode=mode))
    with torch.autocast("cpu", torch.bfloat16):
        output = plan.module.train()(X)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for name, parameter in plan.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def _two_steps(plan: Plan, module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state after two steps of SGD on a batch."""
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return plan.module.state_dict()


def _rank(rank: int, folder: str) -> None:
    for mode in ("mix", "surrogate"):
        plan = planned(Share(every=2, mode=mode), verify="off")
        state = _two_steps(plan, DistributedDataParallel(plan.module.eval()), X[2 * rank : 2 * rank + 2])
        torch.save(state, f"{folder}/{mode}-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    run_ranks(_rank, str(tmp_path))
    for mode in ("mix", "surrogate"):
        plan = planned(Share(every=2, mode=mode), verify="off")
        expected = _two_steps(plan, plan.module.eval(), X)
        ranks = [torch.load(tmp_path / f"{mode}-{r}.pt", weights_only=True) for r in (0, 1)]
        for name, value in expected.items():
            assert torch.equal(ranks[0][name], ranks[1][name])
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["digits", "resnet32", "resnet110", "repl-resnet32", "repl-resnet110", "vit-b", "repl-vit-b"])
def test_installed_specs_are_read(name: str) -> None:
    spec = graphopt.spec.load(f"replacement/{name}")
    assert [p.name for p in spec.passes] == ["share"]


def test_selections_by_order_mean_the_same_after_sharing() -> None:
    freeze = Freeze(select={"blocks": True, "after": "layer1.1", "before": "layer2.1"})
    plan = planned(Share(select="layer1.1"), freeze)
    assert plan.report.passes[1].regions == ("layer1.2", "layer2.0")
    assert not plan.module.get_parameter("layer1.2.conv1.weight").requires_grad


def test_with_a_dropped_prefix() -> None:
    drop = pytest.importorskip("graphopt.passes.drop")
    dropped = drop.Drop(upto="layer1", when={"epoch": 1})
    plan = planned(Share(select="layer3.2"), dropped, model=CifarResNet(32), verify="fast")
    later = plan.advance_to(plan.due(1))
    module = later.module.eval()
    torch.testing.assert_close(later.suffix.eval()(later.prefix(X)), module(X))
    later.export()
    # What is cached must not move, and a mix inside the prefix could: one clear error, before anything runs.
    with pytest.raises(PassError, match=r"both claim layer1\.1: it cannot be removed and shared"):
        planned(Share(select="layer1.1"), dropped, verify="fast")
