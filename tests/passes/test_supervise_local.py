"""A locally supervised module delivers, by one outer backward, exactly what a loop of backwards would, in every way a loop trains."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphopt
from graphopt.cost import forecast
from graphopt.errors import RunError
from graphopt.passes.supervise import Supervise
from graphopt.passes.supervise.local import LocalModule, compile_modules
from graphopt.runtime.randomness import set_seeds
from tests.support.backbones import Small

CUTS = ("blocks.0", "blocks.2")


def plan_of(model: nn.Module, value: Supervise | None = None, input: tuple[int, ...] = (3, 8, 8), **options: Any) -> graphopt.Plan:
    plan = graphopt.compile(model, value or Supervise(cuts=CUTS, **options), input=input, costs=False, verify="fast")
    plan.module.train()
    return plan


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8), torch.arange(n) % 10


def outer_backward(module: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    output, local = module(x, y)
    (scale * (F.cross_entropy(output, y) + local)).backward()
    return output, local


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in module.named_parameters()}


def staged(model: Small, auxiliary: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loop by hand: forward and backward of one module after the other."""
    local = torch.zeros(())
    parts: list[list[nn.Module]] = [[model.stem, model.blocks[0]], [model.blocks[1], model.blocks[2]]]
    for part, aux in zip(parts, auxiliary.children(), strict=True):
        h = x
        for module in part:
            h = module(h)
        loss = aux(h, x, y)
        loss.backward()
        local = local + loss.detach()
        x = h.detach()
    output = model.fc(model.blocks[3](x).mean((2, 3)))
    F.cross_entropy(output, y).backward()
    return output.detach(), local


@pytest.mark.parametrize("structure", ["pointwise", "linear", "conv", "transformer"])
@pytest.mark.parametrize("head", ["pool", "conv", "contrast"])
def test_gradients_are_those_of_a_staged_loop_bit_for_bit(structure: Any, head: Any) -> None:
    model = Small(drop=0.3).train()
    plan = plan_of(model, structure=structure, head=head)
    by_hand, auxiliary = copy.deepcopy(model), copy.deepcopy(plan.module.supervise)
    x, y = batch()
    torch.manual_seed(5)
    output, local = outer_backward(plan.module, x, y)
    torch.manual_seed(5)
    expected, expected_local = staged(by_hand, auxiliary, x, y)
    assert torch.equal(output, expected)
    torch.testing.assert_close(local, expected_local)
    reference = gradients(by_hand) | {f"supervise.{n}": g for n, g in gradients(auxiliary).items()}
    got = gradients(plan.module)
    assert got.keys() == reference.keys()
    for name, gradient in got.items():
        assert gradient is not None, name
        assert torch.equal(gradient, reference[name]), name
    for name, buffer in by_hand.named_buffers():
        assert torch.equal(buffer, plan.module.get_buffer(name)), name


def test_no_gradient_crosses_a_cut() -> None:
    plan = plan_of(Small(drop=0.0))
    x, y = batch()
    output, _ = plan.module(x, y)
    F.cross_entropy(output, y).backward()
    trained = {n for n, g in gradients(plan.module).items() if g is not None}
    assert trained == {n for n in gradients(plan.module) if n.startswith(("blocks.3.", "fc."))}


def test_training_output_and_eval_output_are_the_backbones() -> None:
    model = Small(drop=0.3)
    plan = plan_of(model)
    reference = copy.deepcopy(model).train()
    x, y = batch()
    torch.manual_seed(1)
    output, _ = plan.module(x, y)
    torch.manual_seed(1)
    assert torch.equal(output, reference(x))
    assert torch.equal(plan.module.eval()(x), reference.eval()(x))


def test_eval_runs_no_auxiliary_code_and_passes_gradients_to_the_input() -> None:
    plan = plan_of(Small())
    for auxiliary in plan.module.supervise.children():
        auxiliary.forward = lambda *_: pytest.fail("auxiliary code ran")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plan.module.eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_without_recording_training_mode_needs_no_target() -> None:
    plan = plan_of(Small())
    with torch.no_grad():
        output, local = plan.module(torch.randn(2, 3, 8, 8))
    assert output.shape == (2, 10)
    assert local == 0


def test_accumulation_adds_up() -> None:
    plan = plan_of(Small(drop=0.0))
    plan.module.train()
    for norm in plan.module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    x, y = batch()
    copies = [copy.deepcopy(plan.module) for _ in range(2)]
    for module in copies:
        outer_backward(module, x, y)
    # The second call takes the next turn of positions.
    outer_backward(copies[1], x + 1, y)
    outer_backward(plan.module, x, y)
    for parameter, one in zip(plan.module.parameters(), copies[0].parameters(), strict=True):
        assert torch.equal(parameter.grad, one.grad)
    moved = [not torch.equal(a.grad, b.grad) for a, b in zip(*(c.parameters() for c in copies), strict=True)]
    assert all(moved)


def test_the_incoming_gradient_scales_what_is_delivered() -> None:
    plan = plan_of(Small(drop=0.0))
    twin = copy.deepcopy(plan.module)
    x, y = batch()
    outer_backward(plan.module, x, y)
    outer_backward(twin, x, y, scale=8.0)
    for one, other in zip(plan.module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad * 8, other.grad)


def test_a_loss_that_is_not_used_delivers_nothing_and_breaks_nothing() -> None:
    plan = plan_of(Small(drop=0.0))
    x, y = batch()
    output, local = plan.module(x, y)
    assert local.requires_grad
    output.sum().backward()
    assert plan.module.stem.weight.grad is None


def test_deep_copies_are_apart() -> None:
    plan = plan_of(Small(drop=0.0))
    twin = copy.deepcopy(plan.module)
    x, y = batch()
    outer_backward(twin, x, y)
    assert all(p.grad is None for p in plan.module.parameters())
    assert all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_finite_gradients_everywhere(dtype: torch.dtype) -> None:
    plan = plan_of(Small(drop=0.0))
    x, y = batch()
    reference = copy.deepcopy(plan.module)
    outer_backward(reference, x, y)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=256.0)
    with torch.autocast("cpu", dtype):
        output, local = plan.module(x, y)
        loss = F.cross_entropy(output, y) + local
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(plan.module.parameters(), lr=0.0)
    scaler.unscale_(optimizer)
    for (name, got), expected in zip(plan.module.named_parameters(), reference.parameters(), strict=True):
        assert got.grad is not None, name
        assert got.grad.dtype == torch.float32
        assert got.grad.isfinite().all(), name
        if name.endswith("fc.weight"):
            assert F.cosine_similarity(got.grad.flatten(), expected.grad.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("head", ["pool", "norm-pool", "conv", "contrast"])
def test_weights_in_bfloat16_train(head: Any) -> None:
    module = plan_of(Small(drop=0.0), head=head).module.to(torch.bfloat16)
    output, local = module(torch.randn(6, 3, 8, 8, dtype=torch.bfloat16), torch.arange(6))
    (F.cross_entropy(output, torch.arange(6)) + local).backward()
    assert all(g is not None and g.isfinite().all() for g in gradients(module).values())


def test_float16_gradients_do_not_underflow_inside() -> None:
    # Weights so small that unscaled float16 gradients of activations are all zero.
    plan = plan_of(Small(drop=0.0), decoder="none", weights={"classify": [1e-6, 1e-6]})
    x, y = batch()
    with torch.autocast("cpu", torch.float16):
        output, local = plan.module(x, y)
        (F.cross_entropy(output, y) + local).backward()
    for name, gradient in gradients(plan.module).items():
        if name.startswith(("stem.weight", "blocks.0.conv", "supervise.0.head.fc")):
            assert gradient.abs().max() > 0, name


def test_a_float16_overflow_reaches_the_scaler_and_halves_the_inner_scale() -> None:
    plan = plan_of(Small(drop=0.0))
    module = plan.module
    before = module.get_buffer("supervise.0.scale").item()
    x, y = batch()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights = module.stem.weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        output, local = module(x * 1e6, y)
        loss = F.cross_entropy(output, y) + local
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert module.get_buffer("supervise.0.scale").item() < before
    assert torch.equal(module.stem.weight, weights)
    assert scaler.get_scale() < 4.0


def test_soft_targets_equal_hard_ones_where_they_say_the_same() -> None:
    plan = plan_of(Small(drop=0.0), head="contrast")
    twin = copy.deepcopy(plan.module)
    x, y = batch(12)
    _, hard = plan.module(x, y)
    _, soft = twin(x, F.one_hot(y, 10).float())
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, "needs the targets"),
        (torch.zeros(5, dtype=torch.long), r"shape \(5,\)"),
        (torch.zeros(6, 9), r"shape \(6, 9\)"),
        (torch.zeros(6), r"type torch.float32"),
        (torch.zeros(6, 10, dtype=torch.long), r"shape \(6, 10\)"),
        (torch.zeros(6, dtype=torch.bool), "torch.bool"),
        ([0] * 6, "a list, not a tensor"),
    ],
)
def test_a_target_that_is_none_says_what_to_give(target: Any, words: str) -> None:
    plan = plan_of(Small())
    with pytest.raises(RunError, match=words) as caught:
        plan.module(torch.randn(6, 3, 8, 8), target)
    assert "class indices (6,)" in str(caught.value)
    assert "(6, 10)" in str(caught.value)


def test_compiled_each_module_is_a_graph_and_no_step_compiles_again() -> None:
    plan = plan_of(Small(blocks=2, drop=0.0), Supervise(cuts=("blocks.0",)))
    reference = copy.deepcopy(plan.module.double())
    backend = CompileCounterWithBackend("aot_eager")
    assert compile_modules(plan.module, backend=backend) == 1
    module = torch.compile(plan.module, backend=backend)
    x, y = batch()
    frames = []
    for step in range(4):
        set_seeds(partial(int, step), step)  # as a runner does
        output, _ = outer_backward(module, x.double(), y)
        expected, _ = outer_backward(reference, x.double(), y)
        torch.testing.assert_close(output, expected)
        frames.append(backend.frame_count)
    set_seeds(None, None)
    assert frames == [frames[0]] * 4
    assert frames[0] >= 2
    assert plan.module.get_submodule("supervise.0").step_index == 4
    for one, other in zip(plan.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    copy.deepcopy(plan.module)


def test_activations_are_gone_when_the_next_module_starts() -> None:
    model = Small(width=16, blocks=8, drop=0.0)
    whole = forecast(graphopt.trace(model, (3, 16, 16)).module, (3, 16, 16), 32).peak_activation_bytes
    plan = plan_of(model, Supervise(modules=4, balance="memory"), (3, 16, 16))
    assert forecast(plan.module, (3, 16, 16), 32, targets=True).peak_activation_bytes < 0.45 * whole


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=10, drop_path_rate=0.1
    )


def test_tensors_the_graph_reads_itself_get_their_gradients(vit: nn.Module) -> None:
    plan = graphopt.compile(vit, Supervise(modules=3), input=(3, 32, 32), costs=False)
    module = plan.module.train()
    output, local = module(torch.randn(4, 3, 32, 32), torch.arange(4))
    (output.sum() + local).backward()
    for name in ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"):
        assert module.get_parameter(name).grad.abs().sum() > 0, name


def test_state_dict_keys_are_the_backbones_and_the_auxiliary_ones() -> None:
    model = Small()
    plan = plan_of(model)
    extra = plan.module.state_dict().keys() - model.state_dict().keys()
    assert extra
    assert all(k.startswith(("supervise.0.", "supervise.1.")) for k in extra)
    assert plan.export_state().keys() == model.state_dict().keys()
    assert type(plan.export()) is Small
    assert sum(isinstance(m, LocalModule) for m in plan.module.modules()) == 2


def test_a_kept_graph_delivers_twice_and_a_spent_one_says_so() -> None:
    plan = plan_of(Small(drop=0.0))
    _, local = plan.module(*batch())
    local.backward(retain_graph=True)
    once = {n: g.clone() for n, g in gradients(plan.module).items() if g is not None}
    (2 * local).backward()
    for name, gradient in once.items():
        torch.testing.assert_close(plan.module.get_parameter(name).grad, 3 * gradient)
    with pytest.raises(RunError, match=r"second backward.*retain_graph=True"):
        local.backward()
