"""checkpoint: the same training step with less kept; whatever else is in the plan."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost import forecast, measure
from graphopt.cost.devices import find_device
from graphopt.driver import settle
from graphopt.errors import PassError
from graphopt.models import cifar_resnet
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.freeze import Freeze
from graphopt.spec import dumps, loads
from graphopt.units import parse_size
from tests.support.backbones import Small

INPUT = (3, 8, 8)


def compiled(passes, **options):
    torch.manual_seed(0)
    return graphopt.compile(Small(), passes, input=INPUT, costs=False, **options)


def step(module, seed=5):
    module = copy.deepcopy(module).train()
    torch.manual_seed(seed)
    loss = F.cross_entropy(module(torch.randn(4, *INPUT)), torch.arange(4))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters()}, dict(module.named_buffers())


def same(one, other):
    return one.keys() == other.keys() and all((one[k] is None and other[k] is None) or torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "options", [{"segments": 1}, {"segments": 2}, {"segments": 4}, {"select": ("blocks.1", "blocks.3")}, {"select": "blocks"}]
)
def test_a_training_step_is_bit_equal_dropout_and_running_statistics_included(options):
    plain, checkpointed = compiled([]), compiled(Checkpoint(**options))
    loss, gradients, buffers = step(plain.module)
    loss_c, gradients_c, buffers_c = step(checkpointed.module)
    assert torch.equal(loss, loss_c)
    assert same(gradients, gradients_c)
    assert same(buffers, buffers_c)
    assert checkpointed.module.state_dict().keys() == plain.module.state_dict().keys()


def test_it_keeps_less_and_runs_the_forward_again():
    plain, checkpointed = compiled([]), compiled(Checkpoint(segments=2))
    before, after = forecast(plain.module, INPUT, 8), forecast(checkpointed.module, INPUT, 8, per_block=["blocks"])
    assert after.saved_activation_bytes < 0.6 * before.saved_activation_bytes
    assert after.peak_activation_bytes < before.peak_activation_bytes
    blocks, _ = after.blocks
    # The second half is not run again. Recomputation of the first stops once everything the backward asked for is there.
    assert after.recomputed_flops == blocks.recomputed_flops == blocks.forward_flops // 2
    assert after.backward_flops - after.recomputed_flops == before.backward_flops
    assert after.peak_bytes == measure(checkpointed.module, INPUT, 8).peak_bytes


@pytest.mark.parametrize("segments", [2, 3])
def test_segments_balanced_by_memory_peak_lower_where_blocks_differ(segments):
    peaks = []
    for balance in ("blocks", "memory"):
        torch.manual_seed(0)
        plan = graphopt.compile(
            cifar_resnet.build("resnet20"), Checkpoint(segments=segments, balance=balance), input=(3, 32, 32), verify="off"
        )
        peaks.append(plan.report.after.peak_bytes)
    # Its first stage holds four times as much as its last.
    assert peaks[1] < 0.95 * peaks[0]


def test_every_block_but_the_last_is_a_segment_of_its_own():
    first = ("blocks.0", "blocks.1", "blocks.2")
    every, each = (compiled(Checkpoint(**options)) for options in ({"segments": "every block"}, {"select": first}))
    assert every.report.passes[0].figures["segments"] == 3
    assert forecast(every.module, INPUT, 8) == forecast(each.module, INPUT, 8)
    assert same(step(every.module)[1], step(compiled([]).module)[1])


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_a_budget_is_kept_at_rising_cost_with_the_same_gradients(name):
    if name == "vit":
        sizes = {"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
        rates = {"drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}
        model = timm.create_model("vit_tiny_patch16_224", **sizes, **rates)
    else:
        model = cifar_resnet.build("resnet20")
    passes = ([], *(Checkpoint(budget=budget) for budget in (0.8, 0.6, 0.5)))
    plans = [graphopt.compile(model, each, input=(3, 32, 32), verify="off", costs=False) for each in passes]
    costs = [forecast(plan.module, (3, 32, 32), 8, optimizer=None) for plan in plans]
    peaks = [cost.peak_activation_bytes / costs[0].peak_activation_bytes for cost in costs]
    assert all(peak <= budget for peak, budget in zip(peaks, (1, 0.8, 0.6, 0.5), strict=True))
    assert peaks == sorted(peaks, reverse=True)
    assert [cost.flops for cost in costs] == sorted(cost.flops for cost in costs)
    assert costs[-1].flops <= 1.25 * costs[0].flops
    plain, *others = (gradients(plan.module) for plan in plans)
    assert all(same(plain, other) for other in others)


def gradients(module):
    """Of a step with all random masks drawn alike; and the buffers after it."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    F.cross_entropy(module.train()(x), y).backward()
    return {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())


@pytest.mark.parametrize("first", [Freeze(select=("stem", "blocks.0")), Freeze(select="blocks.1")])
def test_a_budget_inside_blocks_composes(first):
    plain, checkpointed = compiled(first, verify="off"), compiled([first, Checkpoint(budget=0.7)], verify="off")
    assert checkpointed.report.passes[1].figures["segments"]
    for one, other in zip(step(plain.module)[1:], step(checkpointed.module)[1:], strict=True):
        assert same(one, other)


def test_a_budget_that_is_met_already_changes_nothing():
    plan = compiled(Checkpoint(budget=1.0))
    assert not hasattr(plan.module, "sections")
    assert [d.message for d in plan.report.passes[0].diagnostics] == ["its activations are within the budget already"]


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(PassError, match="the lowest is"):
        compiled(Checkpoint(budget=0.01))


@pytest.mark.parametrize("device", [None, "L4"])
def test_a_budget_in_bytes_holds_the_whole_step(device):
    def need(plan):
        cost = forecast(plan.module, INPUT, 512, device=device and find_device(device))
        return cost.cuda.capacity.high if device else cost.peak_bytes

    most = need(compiled([]))
    needs, shares = [], []
    for part in (1.0, 0.8):
        budget = f"{int(part * most)} B"
        plan = compiled(Checkpoint(budget=budget, device=device), batch=512, verify="off")
        needs.append(need(plan))
        assert needs[-1] <= part * most
        shares.append(plan.passes[0].fraction)
        assert parse_size(plan.passes[0].table()["budget"]) == int(part * most)
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert needs == sorted(needs, reverse=True)
    with pytest.raises(PassError, match=r"a step of 512 samples needs at least [\d.]+ MiB.*, the budget is 1.00 MiB"):
        compiled(Checkpoint(budget="1 MiB", device=device), batch=512)


def test_a_budget_in_bytes_is_settled_in_the_spec():
    text = """
verify = "off"
[backbone]
source = "python"
name = "tests.support.backbones:Small"
input = [3, 8, 8]
[[pass]]
use = "checkpoint"
budget = "6 MiB"
[train]
batch = 128
"""
    spec = loads(text)
    assert not spec.settled
    found = settle(spec, trust=True)
    assert loads(dumps(found)) == found
    assert found.settles(spec)
    assert found.passes[0].fraction < 1


def test_eval_and_no_grad_run_plainly():
    plan = compiled(Checkpoint(segments=2))
    x = torch.randn(2, *INPUT)
    module = plan.module.eval()
    assert torch.equal(module(x), compiled([]).module.eval()(x))
    with torch.no_grad():
        assert not module.train()(x).requires_grad


def test_after_freeze_the_frozen_prefix_is_left_alone():
    frozen = Freeze(select=("stem", "blocks.0", "blocks.1"))
    plan = compiled([frozen, Checkpoint(segments="every block")])
    alone = compiled(frozen)
    assert [d.location for d in plan.report.passes[1].diagnostics if d.severity == "skipped"] == ["blocks.0", "blocks.1"]
    assert same(step(plan.module)[1], step(alone.module)[1])
    cost = forecast(plan.module, INPUT, 8, per_block=["blocks.0", "blocks.1", "blocks.2"])
    assert [b.recomputed_flops > 0 for b in cost.blocks[:3]] == [False, False, True]


def test_before_freeze_too():
    passes = [Checkpoint(segments=2), Freeze(select=("stem", "blocks.0", "blocks.1"))]
    assert same(step(compiled(passes).module)[1], step(compiled(passes[1:]).module)[1])


def test_a_trigger_starts_and_ends_it():
    plan = compiled(Checkpoint(segments=2, when={"epoch": 1, "until": 2}))
    assert not hasattr(plan.module, "sections")
    later = plan.advance_to(plan.due(1))
    assert later.report.passes[0].regions
    back = later.advance_to((*later.decisions, *later.due(2)))
    assert not hasattr(back.module, "sections")


ODD = [
    {},
    {"segments": 2, "select": "blocks"},
    {"segments": 0},
    {"segments": "each block"},
    {"select": "blocks", "balance": "memory"},
    {"segments": "every block", "balance": "memory"},
    {"budget": 0.0},
    {"budget": 1.5},
    {"budget": 0.5, "segments": 2},
    {"budget": "1024 furlongs"},
    {"budget": 1024},
    {"budget": 0.5, "device": "L4"},
    {"budget": 0.5, "fraction": 0.5},
]


@pytest.mark.parametrize("options", ODD)
def test_options_that_say_nothing_or_too_much(options):
    with pytest.raises(ValueError):
        Checkpoint(**options)


def test_more_segments_than_blocks_are_refused():
    with pytest.raises(PassError, match="4 blocks"):
        compiled(Checkpoint(segments=5))


def test_a_deep_copy_stands_alone():
    module = compiled(Checkpoint(segments=2)).module
    copied = copy.deepcopy(module)
    step(copied)
    assert all(p.grad is None for p in module.parameters())
    assert same(step(module)[1], step(copied)[1])


class Overwriting(nn.Module):
    """Layers that write into their input: a ReLU of its own, a sum into the shortcut, a ReLU that a view of its input sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sum, self.relu, self.seen = nn.Conv2d(3, 4, 3, padding=1), Sum(), nn.ReLU(inplace=True), Seen()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.seen(0.5 * self.relu(self.sum(self.conv(x)))).mean((2, 3)))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x.add_(self.conv(2 * x))


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        view = x.flatten(1)
        return self.conv(x.relu_()) + view.mean()


@pytest.mark.parametrize(("selected", "checkpointed"), [("relu", 1), ("sum", 1), (("conv", "sum", "relu"), 3), ("seen", 0), ("conv", 1)])
def test_a_segment_runs_again_from_its_input_as_it_was(selected, checkpointed):
    torch.manual_seed(0)
    model, x = Overwriting(), torch.randn(2, *INPUT)
    plan = graphopt.compile(model, Checkpoint(select=selected), input=INPUT, costs=False)
    F.cross_entropy(model(x), torch.arange(2)).backward()
    F.cross_entropy(plan.module(x), torch.arange(2)).backward()
    assert all(torch.equal(p.grad, model.get_parameter(n).grad) for n, p in plan.module.named_parameters())
    (report,) = plan.report.passes
    assert len(report.regions) == checkpointed
    assert checkpointed or "overwritten in place" in report.diagnostics[0].message


def test_compiled_whole_it_is_one_graph():
    model = Small(blocks=2, drop=0.0)
    plan = graphopt.compile(model, Checkpoint(select="blocks.1"), input=INPUT, costs=False, verify="off")
    plain, checkpointed = copy.deepcopy(model).double().train(), plan.module.double().train()
    x, y = torch.randn(4, *INPUT, dtype=torch.float64), torch.arange(4)
    call = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    for function in (plain, call):
        torch.manual_seed(1)
        F.cross_entropy(function(x), y).backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
