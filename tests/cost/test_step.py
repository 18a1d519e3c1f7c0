"""The forecast of a whole training step: exact against a real one, and right in the figures that can be worked out by hand."""

import copy
import functools
import json

import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphopt.cost import CostError, forecast, measure
from graphopt.cost.devices import find_device
from graphopt.ir.copying import fake_copy

MIB = 2**20
# Small inputs: the storages' arithmetic does not depend on the size, the test's time does.
SAMPLE = [
    ("torchvision/resnet18", 64),
    ("own/swin", 64),
    ("torchvision/efficientnet_b0", 32),
    ("own/googlenet", 64),
    ("timm/test_vit", 160),
    ("timm/convnext_atto", 64),
    ("timm/mixer_s32_224", 224),
    ("timm/test_maxvit", 160),
]


def swin():
    """Window attention, shifted and padded."""
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=10)


def build(name):
    library, _, model = name.partition("/")
    if library == "own":
        return swin() if model == "swin" else torchvision.models.googlenet(init_weights=False)  # which would take two seconds
    return timm.create_model(model) if library == "timm" else getattr(torchvision.models, model)(weights=None)


def plain(cost):
    return {key: value for key, value in cost.to_dict().items() if key != "blocks"}


def live(cost):
    """A real step's figures, to compare a forecast's with."""
    # What seconds are estimated from: a real step calls a few operators more or less than a fake one (of random masks, say).
    return plain(cost) | {key: pytest.approx(getattr(cost, key), rel=2e-3) for key in ("kernels", "moved_bytes")}


@pytest.mark.parametrize(("name", "size"), SAMPLE)
def test_equals_a_real_step(name, size):
    module = build(name)
    expected = measure(module, (3, size, size), 2, optimizer="adamw")
    assert plain(forecast(module, (3, size, size), 2, optimizer="adamw")) == live(expected)


@pytest.mark.parametrize("norm", [lambda: torch.nn.BatchNorm2d(3), lambda: torch.nn.GroupNorm(1, 3), lambda: torch.nn.LayerNorm(48)])
def test_a_norm_of_what_has_no_gradient_makes_none(norm):
    module = torch.nn.Sequential(norm(), torch.nn.Flatten(), torch.nn.Linear(3 * 48 * 48, 2))
    assert plain(forecast(module, (3, 48, 48), 64)) == live(measure(module, (3, 48, 48), 64))


def test_meta_and_real_modules_cost_the_same():
    with torch.device("meta"):
        meta = swin()
    assert forecast(meta, (3, 64, 64), 2) == forecast(swin(), (3, 64, 64), 2)


def test_known_figures_of_resnet50():
    # Measured at batch 2 and 224 px: 164 MiB saved, 32.2 GFLOP backward.
    with torch.device("meta"):
        module = torchvision.models.resnet50()
    cost = forecast(module, (3, 224, 224), 2)
    assert cost.parameters == 25_557_032
    assert round(cost.saved_activation_bytes / MIB) == 164
    assert round(cost.backward_flops / 1e9, 1) == 32.2
    # The first convolution has no input gradient; everything else has both.
    assert cost.weight_gradient_flops == cost.forward_flops
    assert cost.forward_flops - cost.input_gradient_flops == 2 * 2 * 64 * 112 * 112 * 3 * 49


def test_known_figures_at_batch_256():
    with torch.device("meta"):
        swin, resnet = torchvision.models.swin_t(), torchvision.models.resnet152()
    swin_cost, resnet_cost = forecast(swin, (3, 224, 224), 256), forecast(resnet, (3, 224, 224), 256)
    assert round(swin_cost.forward_flops / 256 / 1e9, 2) == 8.98
    assert round(resnet_cost.forward_flops / 256 / 1e9, 1) == 23.0
    assert round(resnet_cost.flops / resnet_cost.forward_flops, 2) == 2.99


def test_a_linear_layer_by_hand():
    cost = forecast(nn.Linear(10, 4), (10,), 8, optimizer="adamw")
    assert (cost.parameters, cost.trainable_parameters) == (44, 44)
    assert cost.forward_flops == cost.weight_gradient_flops == 2 * 8 * 10 * 4
    assert cost.input_gradient_flops == 0
    assert cost.parameter_bytes == cost.gradient_bytes == cost.all_reduced_bytes == 44 * 4
    assert cost.optimizer_bytes == 2 * 44 * 4 + 2 * 4  # two moments, and a step count per parameter
    assert cost.input_bytes == 8 * 10 * 4 + 8 * 8


def test_shared_parameters_count_once():
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    module[2].weight = module[0].weight
    cost = forecast(module, (6,), 2)
    assert cost.parameters == 36
    assert cost.gradient_bytes == 36 * 4
    assert plain(cost) == live(measure(module, (6,), 2))


def test_a_frozen_weight_costs_no_weight_gradient_and_an_unneeded_input_gradient_nothing():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    per_layer = [2 * 2 * 36 * 8 * 27, 2 * 2 * 16 * 8 * 72, 2 * 2 * 128 * 4]
    module[1].requires_grad_(False)
    cost = forecast(module, (3, 8, 8), 2)
    assert cost.weight_gradient_flops == per_layer[0] + per_layer[2]
    assert cost.input_gradient_flops == per_layer[1] + per_layer[2]
    module[0].requires_grad_(False)
    cost = forecast(module, (3, 8, 8), 2)
    assert (cost.weight_gradient_flops, cost.input_gradient_flops) == (per_layer[2], 0)
    assert plain(cost) == live(measure(module, (3, 8, 8), 2))


def test_everything_frozen_has_no_backward():
    module = torchvision.models.resnet18().requires_grad_(False)
    cost = forecast(module, (3, 64, 64), 2)
    assert (cost.backward_flops, cost.saved_activation_bytes, cost.optimizer_bytes, cost.all_reduced_bytes) == (0, 0, 0, 0)
    assert cost.peak_phase == "forward"


def test_grouped_convolutions_cost_the_same_in_each_direction():
    # torch's own formula overstates this weight gradient eight times.
    cost = forecast(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()), (8, 8, 8), 2)
    assert cost.weight_gradient_flops == cost.forward_flops == 2 * 2 * 8 * 9 * (36 + 16)


def test_transposed_convolutions():
    module = nn.Sequential(nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Flatten())
    cost = forecast(module, (3, 4, 4), 2)
    assert cost.forward_flops == cost.weight_gradient_flops == 2 * 2 * 16 * 3 * 5 * 4


def test_a_group_norm_keeps_the_layout_of_its_input():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x.contiguous(memory_format=torch.channels_last))

    module = Net(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 144, 5))
    assert plain(forecast(module, (3, 16, 16), 2)) == live(measure(module, (3, 16, 16), 2))


@functools.lru_cache
def positions(count):
    return torch.arange(count) / count


class WithCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(x + positions(8))


def test_what_a_model_caches_on_fake_tensors_reaches_no_real_run():
    module = WithCache()
    expected = forecast(module, (8,), 2)
    assert module(torch.rand(2, 8)).isfinite().all()
    # Full or empty, a cache changes no figure.
    assert plain(forecast(module, (8,), 2)) == plain(expected) == live(measure(module, (8,), 2))


def test_tensors_that_a_module_keeps_in_a_dictionary_are_copied_like_others():
    class Keeping(WithCache):
        def __init__(self):
            super().__init__()
            self.kept = {"cpu": self.fc.weight.detach() * 2}

        def forward(self, x):
            return super().forward(x) + x @ self.kept["cpu"].T

    module = Keeping()
    with FakeTensorMode() as mode:
        assert isinstance(fake_copy(module, mode).kept["cpu"], FakeTensor)
    assert plain(forecast(module, (8,), 2)) == live(measure(module, (8,), 2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).mean(2).flatten(1)


def test_attention_counts_its_products_forward_and_backward():
    cost = forecast(Attention(), (16, 32), 2)
    products = 2 * 2 * 4 * 16 * 16 * 8
    projection = 2 * 2 * 16 * 32 * 96
    assert cost.forward_flops == projection + 2 * products
    assert cost.weight_gradient_flops == projection
    assert cost.input_gradient_flops == 5 * products  # none of them is a weight's


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = checkpoint(self.body, self.stem(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


def test_checkpointing_is_seen_in_bytes_and_recomputed_flops():
    module = Checkpointed()
    cost = forecast(module, (3, 16, 16), 2, per_block=["stem", "body"])
    stem, body, outside = cost.blocks
    assert body.recomputed_flops == body.forward_flops == cost.recomputed_flops > 0
    assert body.weight_gradient_flops == body.input_gradient_flops == body.forward_flops
    assert (stem.recomputed_flops, outside.recomputed_flops) == (0, 0)
    # Nothing of the body is saved but its input, which the checkpoint holds itself.
    assert body.saved_activation_bytes == 0
    assert plain(cost) == live(measure(module, (3, 16, 16), 2))


class LocallyTrained(nn.Module):
    """A block that runs its own backward inside its forward, as local supervision does."""

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, block, head, x, target, *parameters):
            with torch.enable_grad():
                y = block(x.detach())
                loss = F.cross_entropy(head(y.mean((2, 3))), target)
                ctx.gradients = torch.autograd.grad(loss, parameters)
            return y.detach(), loss.detach()

        @staticmethod
        def backward(ctx, _, scale):
            return None, None, None, None, *(g * scale for g in ctx.gradients)

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x, target):
        parameters = [*self.block.parameters(), *self.head.parameters()]
        y, loss = self.Run.apply(self.block, self.head, x, target, *parameters)
        return self.last(y), loss


def test_a_backward_inside_the_forward_is_backward():
    module = LocallyTrained()
    cost = forecast(module, (3, 16, 16), 2, targets=True, per_block=["block", "head", "last"])
    block, head, last, outside = cost.blocks
    assert block.weight_gradient_flops == block.forward_flops == 2 * 2 * 256 * 8 * (27 + 72)
    assert block.input_gradient_flops == 2 * 2 * 256 * 8 * 72
    assert (head.weight_gradient_flops, block.recomputed_flops, block.saved_activation_bytes) == (head.forward_flops, 0, 0)
    assert last.saved_activation_bytes > 0
    assert outside.forward_flops == outside.backward_flops == 0
    assert plain(cost) == live(measure(module, (3, 16, 16), 2, targets=True))


def test_gradients_that_autograd_grad_hands_out_are_not_activations():
    module = LocallyTrained()
    module.block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 512), nn.Unflatten(1, (8, 8, 8)))
    cost = forecast(module, (3, 4, 4), 1, targets=True)
    gradient = 128 * 512 * 4
    assert cost.peak_activation_bytes < gradient  # neither it nor its product with the scale, which reaches .grad, is an activation


class MixedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x):
        weight = self.mix[0] * self.a.weight + self.mix[1] * self.b.weight
        return F.linear(self.b(F.relu(F.linear(self.a(x), weight))), weight)


def test_a_computed_weight_is_a_weight():
    cost = forecast(MixedWeight(), (6,), 4)
    assert cost.weight_gradient_flops == cost.forward_flops
    assert cost.input_gradient_flops == cost.forward_flops * 3 // 4


def test_weights_cast_by_autocast_are_weights():
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    cost = forecast(module, (6,), 4, amp="bfloat16")
    assert cost.weight_gradient_flops == cost.forward_flops
    assert cost.input_gradient_flops == cost.forward_flops // 2


def test_rows_add_up_and_blocks_take_everything_under_them():
    module = torchvision.models.resnet18()
    cost = forecast(module, (3, 64, 64), 2, per_block=["layer1", "layer1.0", "layer3"])
    outer, inner, third, outside = cost.blocks
    assert [b.path for b in cost.blocks] == ["layer1", "layer1.0", "layer3", ""]
    assert outer == forecast(module, (3, 64, 64), 2, per_block=["layer1.1"]).blocks[0].__class__("layer1", *list(vars(outer).values())[1:])
    for name in ("parameters", "forward_flops", "weight_gradient_flops", "input_gradient_flops", "saved_activation_bytes"):
        assert sum(getattr(b, name) for b in cost.blocks) == getattr(cost, name), name
    assert inner.parameters == sum(p.numel() for p in module.layer1[0].parameters())
    assert third.parameters == sum(p.numel() for p in module.layer3.parameters())
    assert outside.parameters == cost.parameters - outer.parameters - inner.parameters - third.parameters
    json.dumps(cost.to_dict())


def test_a_graph_module_costs_the_same_as_its_source_and_as_its_own_code():
    module = torchvision.models.resnet18()
    graph = fx.symbolic_trace(module)
    blocks = ["layer1", "layer2.0", "fc"]
    of_module, of_graph = (forecast(m, (3, 64, 64), 2, per_block=blocks) for m in (module, graph))
    # Functions between modules (a residual sum) save nothing here, so both attribute alike.
    assert of_graph.blocks[2] == of_module.blocks[2]
    assert plain(of_graph) == live(measure(graph, (3, 64, 64), 2))
    assert plain(of_graph) == live(measure(graph, (3, 64, 64), 2, attribute=True))


def test_function_nodes_go_to_their_origins_path():
    class Origin(str):
        path = "block.deep"

    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    for node in graph.graph.nodes:
        if node.op == "call_module":
            node.meta["origin"] = Origin()
    cost = forecast(graph, (4,), 2, per_block=["block"])
    assert cost.blocks[0].forward_flops == cost.forward_flops
    assert cost.blocks[0].weight_gradient_flops == cost.weight_gradient_flops


def test_a_step_records_gradients_in_every_mode_of_the_caller() -> None:
    module = nn.Linear(3, 2)
    expected = forecast(module, (3,), 2).backward_flops
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert forecast(module, (3,), 2).backward_flops == measure(module, (3,), 2).backward_flops == expected > 0


def test_on_a_device_a_batch_stays_until_the_next_one_is_there() -> None:
    steps = forecast(nn.Linear(3, 2), (3,), 2, device=find_device("A100")).cuda
    assert steps is not None
    assert steps.least.events


def test_the_module_is_left_alone():
    module = torchvision.models.resnet18().eval()
    before = copy.deepcopy(module.state_dict())
    forecast(module, (3, 64, 64), 2)
    measure(module, (3, 64, 64), 2)
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert "forward" not in vars(module.layer1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum().item() > 0 else self.fc(-x)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: forecast(Looks(), (4,), 2), "looks at tensor values"),
        (lambda: forecast(nn.Linear(4, 4), (5,), 2), "does not take a batch of shape (2, 5)"),
        (lambda: forecast(nn.Linear(4, 4), (4,), 2, optimizer="sdg"), "'sdg' cannot be made"),
        (lambda: forecast(nn.Linear(4, 4), (4,), 2, amp="half"), "amp is one of"),
        (lambda: forecast(nn.Linear(4, 4), (4,), 0), "at least one sample"),
        (lambda: forecast(nn.Linear(4, 4), (4,), 2, loss="mse"), "loss is one of"),
        (lambda: measure(nn.Linear(4, 4, device="meta"), (4,), 2), "meta device"),
    ],
)
def test_errors_say_what_is_wrong(call, says):
    with pytest.raises(CostError) as error:
        call()
    assert says in str(error.value)
