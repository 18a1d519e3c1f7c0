"""Backbones of several inputs: what they may be, and every pass on one that takes an image, numbers and tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import RunError, TraceError
from graphopt.compiler.stages import every_module, stages
from graphopt.cost import forecast, measure
from graphopt.diff.view import plan_view
from graphopt.ir.inputs import as_input, input_of, samples, show
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.planning.run_cost import forecast_run
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train

INPUT = ((3, 8, 8), (4,), ((2,), torch.int64))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(F.relu(self.conv(x)))


class Joined(nn.Module):
    """Numbers join the image at the stem, tokens before the head; an embedding of the numbers is read again by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.tokens = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 8), nn.Embedding(5, 8)
        self.blocks, self.fc = nn.Sequential(*(Block() for _ in range(4))), nn.Linear(8, 3)

    def forward(self, image: Tensor, target: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
        x = self.blocks(self.stem(image) + self.side(target * scale)[:, :, None, None])
        return self.fc(x.mean((2, 3)) + self.tokens(tokens).mean(1))


PASSES: dict[str, Any] = {
    "freeze": Freeze(select="blocks.1"),
    "share": Share(every=2),
    "drop": Drop(upto="blocks.0"),
    "bypass": Drop(mode="bypass", select="blocks.2"),
    "supervise": Supervise(modules=2),
    "image decoder": Supervise(modules=2, decoder="image", balance="memory", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
    "checkpoint": Checkpoint(select="blocks.*"),
}


def batch() -> tuple[Tensor, ...]:
    return samples(INPUT, 4, torch.rand)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_holds_in_any_loop(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Joined()
    plan = graphopt.compile(backbone, PASSES[name], input=INPUT, batch=4)
    assert plan.report.passes[0].verified
    targets, suffix = plan.needs.targets, plan.needs.features is not None
    if not suffix:
        found, expected = measure(plan.module, INPUT, 4, targets=targets), plan.report.after
        assert expected is not None
        assert (found.peak_bytes, found.flops) == (expected.peak_bytes, expected.flops)

    optimizer = torch.optim.SGD((p for p in plan.module.parameters() if p.requires_grad), 0.1)
    given, labels = batch(), torch.arange(4) % 3
    losses = []
    for _ in range(4):
        output, local = plan.module(*given, labels) if targets else (plan.module(*given), torch.zeros(()))
        loss = F.cross_entropy(output, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss + local)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    graphopt.save(plan, tmp_path / "plan.safetensors")
    plan.module.eval()
    with torch.no_grad():
        expected_output = plan.module(*given)
        assert torch.equal(copy.deepcopy(plan.module)(*given), expected_output)
        assert torch.allclose(plan.export().eval()(*given), expected_output, atol=1e-5)
        again = graphopt.load(
            tmp_path / "plan.safetensors", plan=graphopt.compile(Joined(), PASSES[name], input=INPUT, verify="off", costs=False)
        )
        assert torch.equal(getattr(again, "module", again).eval()(*given), expected_output)


def test_what_is_planned_from_a_plan_knows_all_inputs() -> None:
    plan = graphopt.compile(Joined(), Drop(upto="blocks.0"), input=INPUT, batch=4, verify="off")
    cost = forecast_run(plan, TrainSpec(epochs=2, batch=4), samples=16, evaluated=8)
    assert cost.phases[0].step.peak_bytes == plan.report.after.peak_bytes
    assert cost.run.filling_forward_flops > 0
    assert "3×8×8 and 4 and 2" in repr(plan_view(plan))
    chain = graphopt.compile(Joined(), [Freeze(select="tokens"), Supervise(modules=2)], input=INPUT, verify="off", costs=False)
    first, last = stages(chain, every_module(chain), 4)
    assert len(first.incoming) == 3
    assert len(last.incoming) == 3, "features, tokens and the local loss"
    assert last.forecast(4).flops > 0


def test_the_graph_names_its_inputs_and_the_batch_stays_free() -> None:
    graph = graphopt.trace(Joined(), INPUT)
    assert [n.name for n in graph.fx.find_nodes(op="placeholder")] == ["x", "target_", "tokens"]
    assert input_of(graph.module) == graph.input == INPUT
    for size in (1, 3):
        assert graph.module(*samples(INPUT, size, torch.randn)).shape == (size, 3)
    assert graph.clone().input == INPUT


class Masked(nn.Module):
    """The second input is optional; the third is one number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.label = nn.Linear(6, 3), nn.Embedding(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *labels: Tensor) -> Tensor:
        if mask is not None:
            x = x.masked_fill(mask, 0)
        return self.fc(x) + sum((self.label(one) for one in labels), torch.zeros(3))


@pytest.mark.parametrize(
    ("given", "names", "shown"),
    [
        ((6,), ["x"], "(N, 6)"),
        ([[6]], ["x"], "(N, 6)"),
        (((6,), ((6,), torch.bool)), ["x", "mask"], "(N, 6) and (N, 6)"),
        ([[6], [[6], torch.bool], [[], torch.int64]], ["x", "mask", "x_2"], "(N, 6) and (N, 6) and (N)"),
    ],
)
def test_inputs_are_shapes_with_a_dtype_where_it_is_not_the_backbones(given: Any, names: list[str], shown: str) -> None:
    graph = graphopt.trace(Masked(), given)
    assert [n.name for n in graph.fx.find_nodes(op="placeholder")] == names
    assert show(graph.input) == shown


def test_whole_numbers_alternate_so_that_no_mask_hides_everything() -> None:
    _, mask, number = samples(((6,), ((3,), torch.bool), ((), torch.int64)), 2, torch.zeros)
    assert mask.tolist() == [[False, True, False], [True, False, True]]
    assert number.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((6, (8,)), "one of several inputs is a shape"),
        (((6,), torch.bool), "one of several inputs is a shape"),
        (((6,), ((8,), torch.float16)), "has the backbone's dtype"),
        (((6,), (0,)), "one sample of shape"),
        (((6,), (10**9,)), "one sample of shape"),
        (("a",), "whole numbers"),
        ((2.5,), "whole numbers"),
        ((), "one sample of shape"),
    ],
)
def test_what_is_no_input_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_input(given)
    with pytest.raises(TraceError, match=says):
        graphopt.trace(Masked(), given)


def test_too_few_and_too_many_inputs_are_refused_with_the_call_that_serves(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"3 required inputs.*shape of 2 was given.*graphopt\.compile\(model, passes, input=\(\(3"):
        graphopt.trace(Joined(), ((3, 8, 8), (4,)))
    with pytest.raises(TraceError, match="shape of 2 was given"):
        graphopt.trace(nn.Sequential(nn.Linear(3, 3)), ((3,), (3,)))
    plan = graphopt.compile(Joined(), Freeze(select="stem"), input=INPUT, verify="off", costs=False)
    with pytest.raises(RunError, match="one image, this one takes"):
        train(plan, tmp_path / "run", settings=TrainSpec(epochs=1), data=DataSpec(name="digits"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_forecast_s_inputs_have_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    module = nn.Linear(4, 3).to(dtype)
    assert forecast(module, (4,), 2).peak_bytes == measure(module, (4,), 2).peak_bytes
