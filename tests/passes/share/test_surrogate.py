"""Surrogates: what stays of a block, what it computes, what it saves, and how it is stored."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphopt
from graphopt import GraphoptError, PassError, Plan, RunError, Severity
from graphopt.ir.blocks import find_blocks
from graphopt.ir.regions import region_at
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.spec import from_table
from tests.passes.share.backbones import Units, compiled, family, shared_blocks

planned = functools.partial(compiled, mode="surrogate", verify="full")


# -- what it saves --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "flops", "peak"), [(4, 0.90, 0.91), (2, 0.80, 0.82)])
def test_resnet110_costs_what_it_must(k: int, flops: float, peak: float) -> None:
    plan = graphopt.compile(CifarResNet(110), Share(every=k, mode="surrogate"), input=(3, 32, 32), verify="off", batch=128)
    before, after = plan.report.before, plan.report.after
    assert after.forward_flops / before.forward_flops <= flops
    assert after.backward_flops / before.backward_flops <= flops
    assert after.peak_activation_bytes / before.peak_activation_bytes <= peak
    assert after.saved_activation_bytes < before.saved_activation_bytes


SAVES = [
    "CIFAR ResNet",
    "torchvision ResNet, basic",
    "torchvision ResNet, bottleneck",
    "timm ResNetV2, pre-activation",
    "VGG units with norms",
    "torchvision ViT",
    "timm ViT",
    "timm CaiT",
    "torchvision Swin",
    "timm Swin",
    "torchvision ConvNeXt",
    "timm ConvNeXt",
    "timm ConvNeXt-V2",
]


@pytest.mark.parametrize("name", SAVES)
def test_every_family_saves_flops_activations_and_parameters(name: str) -> None:
    model, shape, count = family(name)
    plan = planned(model, shape, every=2, costs=True, batch=64)
    assert len(plan.report.passes[0].regions) == count
    before, after = plan.report.before, plan.report.after
    for figure in ("parameters", "forward_flops", "backward_flops", "saved_activation_bytes"):
        assert getattr(after, figure) < getattr(before, figure), figure
    names = {n for n, _ in plan.module.named_parameters()}
    called = {str(n.target) for n in plan.graph.nodes if n.op in ("call_module", "get_attr")}
    assert all(any(n == c or n.startswith(f"{c}.") for c in called) for n in names - set(plan.base.unused)), "an orphan is still stored"


def test_the_report_notes_where_nothing_can_be_saved() -> None:
    bare = planned(Units(norms=False), (3, 16, 16), every=2, costs=True, batch=64).report
    assert bare.after.forward_flops < bare.before.forward_flops
    mix = compiled(CifarResNet(20), every=2).report
    for report, message in ((bare, "saves FLOPs only"), (mix, "not FLOPs or activations")):
        assert any(d.severity is Severity.NOTE and message in d.message for d in report.passes[0].diagnostics)


@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "torchvision Swin", "timm Swin"])
def test_the_mlp_can_be_the_half_that_stays(name: str) -> None:
    model, shape, _ = family(name)
    plan = planned(model, shape, every=2, parts="mlp")
    attention, mlp = (planned(model, shape, every=2, parts=p).module for p in ("attention", "mlp"))
    assert len(plan.report.passes[0].regions) > 0
    assert {n for n, _ in attention.named_parameters()} != {n for n, _ in mlp.named_parameters()}


# -- what it computes -----------------------------------------------------------------------------------------------------------
def mixed(plan: Plan, path: str, tensor: str) -> Tensor:
    """What a tensor of `path` is a mix of, by hand: half of each neighbour's."""
    before, after = next(t.sources for t in shared_blocks(plan)[path].tensors if t.name == f"{path}.{tensor}")
    state = plan.module.state_dict()
    return 0.5 * state[before] + 0.5 * state[after]


def inside(plan: Plan, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block's input and output in the emitted module."""
    region, seen = region_at(plan.graph, path), values(plan, x)
    return seen[region.entries[0].name], seen[region.exits[0].name]


def values(plan: Plan, x: Tensor) -> dict[str, Tensor]:
    """What every node of the emitted module computes."""
    seen: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            seen[n.name] = value.clone() if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Watch(plan.module).run(x)
    return seen


def test_a_basic_block_is_its_last_convolution_norm_and_shortcut() -> None:
    model, shape, _ = family("CIFAR ResNet")
    plan = planned(model, shape, select="layer1.1")
    plan.module.eval()
    x, y = inside(plan, "layer1.1", torch.rand(2, *shape))
    norm = plan.module.get_submodule("layer1.1.bn2")
    expected = F.relu(norm(F.conv2d(x, mixed(plan, "layer1.1", "conv2.weight"), padding=1)) + x)
    torch.testing.assert_close(y, expected)
    stored = {k for k in plan.module.state_dict() if k.startswith("layer1.1.")}
    assert stored == {"layer1.1.share.a", "layer1.1.share.b"} | {
        f"layer1.1.bn2.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


def test_halves_of_neighbouring_blocks_stand_one_behind_the_other() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=6, num_classes=10)
    share = Share(select=["blocks.2", "blocks.3"], mode="surrogate", boundary="nearest")
    plan = graphopt.compile(model, share, input=(3, 32, 32), batch=2)
    plan.module.eval()
    image = torch.rand(2, 3, 32, 32)
    (x, first), (second, y) = (inside(plan, path, image) for path in ("blocks.2", "blocks.3"))
    assert torch.equal(first, second)
    assert len({float(value.sum()) for value in (x, first, y)}) == 3
    assert not [key for key in plan.module.state_dict() if key.startswith(("blocks.2.mlp", "blocks.3.mlp"))]


def test_a_bottleneck_is_its_pointwise_pair() -> None:
    model, shape, _ = family("torchvision ResNet, bottleneck")
    plan = planned(model, shape, every=2)
    (path,) = plan.report.passes[0].regions
    plan.module.eval()
    x, y = inside(plan, path, torch.rand(2, *shape))
    down, up = (mixed(plan, path, f"conv{i}.weight") for i in (1, 3))
    expected = F.relu(plan.module.get_submodule(f"{path}.bn3")(F.conv2d(F.conv2d(x, down), up)) + x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_convnext_block_is_its_depthwise_convolution() -> None:
    model, shape, _ = family("torchvision ConvNeXt")
    plan = planned(model, shape, every=2)
    (path,) = plan.report.passes[0].regions
    plan.module.eval()
    x, y = inside(plan, path, torch.rand(2, *shape))
    dim = x.shape[1]
    spread = F.conv2d(x, mixed(plan, path, "block.0.weight"), mixed(plan, path, "block.0.bias"), padding=3, groups=dim)
    normal = plan.module.get_submodule(f"{path}.block.2")(spread.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, x + plan.module.get_parameter(f"{path}.layer_scale") * normal)


@pytest.mark.parametrize("norms", [True, False])
def test_a_plain_unit_is_a_partial_convolution_with_a_shortcut(norms: bool) -> None:
    torch.manual_seed(0)
    plan = planned(Units(norms), (3, 16, 16), every=2)
    (name,) = plan.report.passes[0].regions
    path = find_blocks(plan.graph)[3].paths[0]
    assert name.startswith(path)
    module = plan.module.eval()
    weight, bias = (sum(0.5 * module.get_parameter(s)[:4] for s in t.sources) for t in shared_blocks(plan)[name].tensors)
    seen = values(plan, torch.rand(2, 3, 16, 16))
    conv = next(n for n in module.graph.nodes if n.target is torch.conv2d or getattr(n.target, "__name__", "") == "conv2d")
    x = seen[conv.args[0].args[0].name]
    part = F.conv2d(x[:, :4], weight[:, :4], bias, padding=1)
    if norms:
        part = module.get_submodule(find_blocks(plan.graph)[3].paths[1])(part)
    expected = F.relu(torch.cat([x[:, :4] + part, x[:, 4:]], 1))
    relu = next(n for n in module.graph.nodes if n.op == "call_module" and n.target == find_blocks(plan.graph)[3].paths[1 + norms])
    torch.testing.assert_close(seen[relu.name], expected)


@pytest.mark.parametrize("name", ["CIFAR ResNet", "timm ViT", "timm ConvNeXt", "VGG units with norms"])
def test_it_trains_and_sources_get_gradients_from_both_places(name: str) -> None:
    model, shape, _ = family(name)
    plan, alone = (planned(model, shape, every=2, detach=d) for d in (False, True))
    x = torch.rand(4, *shape)
    gradients = []
    for module in (plan.module, alone.module):
        module.eval()(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters()})
    for tensor in next(iter(shared_blocks(plan).values())).tensors:
        for source in tensor.sources:
            assert not torch.equal(gradients[0][source], gradients[1][source])
    scalars = [n for n in gradients[0] if n.endswith((".share.a", ".share.b"))]
    assert scalars
    assert all(torch.allclose(gradients[0][n], gradients[1][n]) and gradients[0][n] != 0 for n in scalars)


# -- what has none --------------------------------------------------------------------------------------------------------------
class Gated(nn.Module):
    """A residual block of three spatial convolutions: no light operator is known for it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: CifarResNet(20), {"select": "layer2.0"}, "shortcut has weights of its own"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *(Gated() for _ in range(4))), {"every": 2}, "in no arrangement that a light operator"),
        (lambda: Units(), {"select": "features.4-6"}, "takes 8 channels to 16"),
        (lambda: family("timm ViT")[0], {"parts": "all"}, "a whole transformer block is no light operator"),
        (lambda: CifarResNet(20), {"parts": "attention"}, "it has no attention: parts = 'attention' is for transformer blocks"),
    ],
)
def test_blocks_without_a_light_form_say_why(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        planned(model(), (3, 16, 16), **options)


# -- how it is stored -------------------------------------------------------------------------------------------------------------
def test_export_says_what_to_do_instead_and_load_gives_the_model_back(tmp_path: Path) -> None:
    spec = from_table(
        {
            "backbone": {"source": "cifar", "name": "resnet20", "input": [3, 8, 8]},
            "pass": [{"use": "share", "every": 2, "mode": "surrogate"}],
        }
    )
    plan = graphopt.compile(None, spec, costs=False)
    with torch.no_grad():
        for parameter in plan.module.parameters():
            parameter.add_(0.01)
    with pytest.raises(PassError, match=r"cannot express them.*graphopt\.save.*graphopt\.load"):
        plan.export()
    graphopt.save(plan, tmp_path / "model.safetensors")
    model = graphopt.load(tmp_path / "model.safetensors")
    x = torch.rand(2, 3, 8, 8)
    assert not model.training
    assert torch.equal(model(x), plan.module.eval()(x))
    assert not any(k.startswith("layer1.1.conv") for k in load_file(tmp_path / "model.safetensors"))


def test_a_plan_compiled_by_hand_is_loaded_into_itself(tmp_path: Path) -> None:
    plan = planned(CifarResNet(20), (3, 8, 8), every=2)
    graphopt.save(plan, tmp_path / "m.safetensors")
    with pytest.raises(RunError, match="compiled by hand"):
        graphopt.load(tmp_path / "m.safetensors")
    other = planned(CifarResNet(20), (3, 8, 8), every=2)
    model = graphopt.load(tmp_path / "m.safetensors", plan=other)
    assert all(torch.equal(v, plan.module.state_dict()[k]) for k, v in model.state_dict().items())


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, message in (("plain", "a checkpoint of a backbone"), ("broken", "damaged"), ("none", "no such file")):
        with pytest.raises(RunError, match=message):
            graphopt.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(RunError, match="no such folder"):
        graphopt.save(planned(CifarResNet(20), (3, 8, 8), every=2), tmp_path / "no" / "m.safetensors")


def test_a_checkpoint_of_the_backbone_gives_what_is_left_its_weights() -> None:
    model, shape, _ = family("VGG units with norms")
    plan = planned(model, shape, every=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    plan.load_backbone(other.state_dict())
    state, theirs = plan.module.state_dict(), other.state_dict()
    narrowed = [k for k in state if k in theirs and state[k].shape != theirs[k].shape]
    assert len(narrowed) == 4
    for key in state.keys() & theirs.keys():
        part = theirs[key][: len(state[key])] if key in narrowed else theirs[key]
        assert torch.equal(state[key], part)


def test_a_block_that_is_frozen_later_is_not_given_its_own_weights_back() -> None:
    frozen, shared = Freeze(select="layer1", when={"epoch": 1}), Share(select="layer1.1", mode="surrogate")
    with pytest.raises(PassError, match=r"layer1.1 would lose what it learnt.*Put share before freeze"):
        graphopt.compile(CifarResNet(20), [frozen, shared], input=(3, 8, 8), verify="off", costs=False)
    plan = graphopt.compile(CifarResNet(20), [shared, frozen], input=(3, 8, 8), verify="off", costs=False)
    x = torch.rand(2, 3, 8, 8)
    later = plan.advance_to((*plan.decisions, *plan.due(1)))
    assert torch.equal(later.module.eval()(x), plan.module.eval()(x))
    first = [Freeze(select="layer1"), Share(select="layer1.1", mode="surrogate", when={"epoch": 1})]
    graphopt.compile(CifarResNet(20), first, input=(3, 8, 8), verify="off", costs=False)  # what is frozen from the start learns nothing
