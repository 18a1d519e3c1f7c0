"""What a decoder samples: positions match the patches at their place, all are covered, and the backbone is not affected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.errors import RunError
from graphopt.passes.supervise import Supervise
from graphopt.passes.supervise.decoders import build, incompatibility, position_at
from graphopt.passes.supervise.layout import ActivationLayout
from graphopt.passes.supervise.local import compile_modules
from tests.passes.supervise_steps import compiled
from tests.support.backbones import Small


def first(channels: int, *grid: int) -> ActivationLayout:
    return ActivationLayout(1, channels, grid[0] * grid[1], (grid[0], grid[1]), 0, 4)


def last(channels: int, *grid: int) -> ActivationLayout:
    return ActivationLayout(3, channels, grid[0] * grid[1], (grid[0], grid[1]), 0, 4)


def tokens(channels: int, prefix: int, *grid: int) -> ActivationLayout:
    return ActivationLayout(2, channels, prefix + grid[0] * grid[1], (grid[0], grid[1]), prefix, 3)


def line(channels: int, length: int) -> ActivationLayout:
    return ActivationLayout(2, channels, length, None, 0, 3)


#: source, goal, share of the rows, and how many positions are looked at
PAIRS = [
    (first(3, 8, 8), first(2, 8, 8), 0.25, 16),
    (first(3, 4, 6), first(2, 8, 12), 0.5, 12),
    (last(3, 7, 7), last(2, 14, 14), 0.125, 7),
    (last(3, 4, 4), first(2, 16, 8), 1.0, 16),
    (tokens(3, 1, 6, 6), tokens(2, 1, 6, 6), 0.3, 12),
    (tokens(3, 0, 4, 4), tokens(2, 2, 8, 8), 0.25, 4),
    (tokens(3, 1, 4, 4), first(2, 32, 32), 0.25, 4),
    (line(3, 10), line(2, 10), 0.3, 3),
    (line(3, 16), tokens(2, 1, 4, 4), 0.25, 4),
    (ActivationLayout(1, 5, 1, (1, 1), 0, 2), first(2, 4, 4), 0.125, 1),
]


def filled(layout: ActivationLayout, grid: tuple[int, int]) -> Tensor:
    """An activation (2, ...) of that layout whose every position holds the number of the position of `grid` that it lies over."""
    height, width = layout.grid or grid
    rows = torch.arange(height) // (height // grid[0])
    columns = torch.arange(width) // (width // grid[1])
    numbers = (rows[:, None] * grid[1] + columns).float()
    if layout.rank == 4:
        return numbers.expand(2, layout.channels, -1, -1).movedim(1, layout.channel).contiguous()
    flat = torch.cat([torch.full((layout.prefix,), -1.0), numbers.flatten()]).expand(2, layout.channels, -1)
    return flat.squeeze(2) if layout.rank == 2 else flat.movedim(1, layout.channel).contiguous()


class Identity(nn.Module):
    """In the place of a decoder's layers: what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("source", "goal", "fraction", "count"), PAIRS)
def test_positions_match_their_patches_and_all_are_covered(source: Any, goal: Any, fraction: float, count: int) -> None:
    assert incompatibility("linear", source, goal) is None
    decoder: Any = build("linear", source, goal, fraction)
    decoder.fc = Identity()
    grid = source.grid or goal.grid or (source.length, 1)
    h, x = filled(source, grid), filled(goal, grid)
    found = set()
    for step_index in range(2 * grid[0]):
        whole, state = decoder.sample(h, step_index)
        assert torch.equal(whole, h)
        picked, patches = decoder(state, x)
        assert picked.shape == (2, count, source.channels)
        # One matrix product for all samples needs this: else the weight's gradient is made sample by sample.
        assert state[0].is_contiguous()
        assert patches.shape[:2] == (2, count)
        assert (patches == picked[..., :1]).all()
        found |= set(picked[0, :, 0].tolist())
    assert found == set(range(grid[0] * grid[1]))


def test_a_goal_that_is_no_multiple_is_pooled_to_the_nearest() -> None:
    source, goal = first(3, 7, 7), first(2, 15, 15)
    decoder = build("linear", source, goal, 0.3)
    prediction, wanted = decoder(decoder.sample(torch.randn(2, 3, 7, 7), 1)[1], torch.ones(2, 2, 15, 15))
    assert prediction.shape == wanted.shape == (2, 14, 2 * 4)
    torch.testing.assert_close(wanted, torch.ones_like(wanted))


@pytest.mark.parametrize("structure", ["linear", "pointwise", "transformer"])
@pytest.mark.parametrize(("source", "goal", "fraction", "count"), PAIRS)
def test_the_gradient_is_that_of_indexing(
    structure: Any, source: ActivationLayout, goal: ActivationLayout, fraction: float, count: int
) -> None:
    decoder: Any = build(structure, source, goal, fraction).double()
    grid = source.grid or goal.grid or (source.length, 1)
    h = torch.randn(filled(source, grid).shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(filled(goal, grid).shape, dtype=torch.float64)
    whole, state = decoder.sample(h, 3)
    prediction, wanted = decoder(state, x)
    weight = torch.randn_like(h)
    (got,) = torch.autograd.grad((whole * weight).sum() + F.l1_loss(prediction, wanted), h)
    # By hand: the same rows through autograd's own indexing, found by the numbers of their positions.
    numbers = decoder.sample(filled(source, grid), 3)[1][0][0, :, 0].long()
    flat = h.unsqueeze(1) if source.rank == 2 else h.movedim(source.channel, -1).flatten(1, -2)
    picked = flat[:, source.prefix + numbers]
    again = decoder.fc(picked if decoder.block is None else decoder.block(picked))
    (expected,) = torch.autograd.grad((h * weight).sum() + F.l1_loss(again, wanted), h)
    torch.testing.assert_close(got, expected)


def test_a_window_of_the_conv_decoder_wanders_over_the_whole_map() -> None:
    source, goal = first(3, 6, 6), first(2, 12, 12)
    decoder = build("conv", source, goal, 0.25)
    h, x = filled(source, (6, 6)), filled(goal, (6, 6))
    found = set()
    for step_index in range(16):
        _, state = decoder.sample(h, step_index)
        prediction, window = decoder(state, x)
        assert prediction.shape == window.shape == (2, 2, 6, 6)
        found |= set(window.flatten().tolist())
    assert found == set(range(36))


@given(st.integers(1, 200), st.integers(0, 10**6))
def test_each_position_is_taken_once_in_as_many_steps(count: int, begin: int) -> None:
    assert {position_at(step, count) for step in range(begin, begin + count)} == set(range(count))


def test_a_layout_of_more_dimensions_is_refused_with_words() -> None:
    video = ActivationLayout(1, 3, 4 * 8 * 8, None, 0, 5)
    assert "not activations of 5 dimensions" in str(incompatibility("linear", video, video))


def test_the_step_index_is_part_of_the_state_dict() -> None:
    module = compiled(Small(drop=0.0), Supervise(modules=2), verify="off").module.train()
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)

    def stepped(one: nn.Module) -> list[Tensor]:
        one.zero_grad()
        output, local = one(x, y)
        (F.cross_entropy(output, y) + local).backward()
        return [p.grad.clone() for n, p in one.named_parameters() if n.startswith("supervise.")]

    fresh = copy.deepcopy(module)
    begun = stepped(module)
    state = copy.deepcopy(module.state_dict())
    gone_on = stepped(module)
    assert not all(torch.equal(a, b) for a, b in zip(begun, gone_on, strict=True))
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(stepped(fresh), gone_on, strict=True))


@pytest.mark.parametrize("structure", ["linear", "conv"])
def test_a_compiled_module_is_not_compiled_again_for_every_step(structure: Any) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    made: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, example)

    module = compiled(Small(drop=0.0), Supervise(modules=2, structure=structure), (3, 16, 16), verify="off").module.train()
    reference = copy.deepcopy(module)
    compile_modules(module, backend=backend)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    for _ in range(10):
        losses = [one(x, y)[1] for one in (module, reference)]
        torch.testing.assert_close(*losses)
    # Once for a number, once for any number.
    assert len(made) <= 2


@pytest.mark.parametrize(("channels", "full"), [(48, True), (128, True), (512, False), (2048, False)])
def test_the_linear_decoder_of_wide_features_is_of_low_rank(channels: int, full: bool) -> None:
    decoder = build("linear", first(channels, 4, 4), first(channels, 4, 4), 0.25)
    size = sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
    assert size == (channels**2 if full else 2 * 64 * channels)
    prediction, wanted = decoder(decoder.sample(torch.randn(2, channels, 4, 4), 0)[1], torch.randn(2, channels, 4, 4))
    assert prediction.shape == wanted.shape == (2, 4, channels)


# -- the image and the contrast -------------------------------------------------------------------------------------------------
def test_an_image_that_its_statistics_do_not_revert_is_an_error() -> None:
    value = Supervise(modules=2, decoder="image", mean=(0.5,) * 3, std=(0.25,) * 3)
    module = compiled(Small(drop=0.0), value, verify="off").module.train()
    y = torch.arange(4)
    module(torch.rand(4, 3, 8, 8) * 3.98 - 1.99, y)  # [0, 1] and the rounding of bfloat16
    for outside, words in ((torch.full((4, 3, 8, 8), 2.1), "from 1.02 to 1.02"), (torch.full((4, 3, 8, 8), -2.1), "from -0.025 to -0.025")):
        with pytest.raises(RunError, match=f"the image has values {words}.*Give mean and std"):
            module(outside, y)
    module.eval()(outside)


def test_the_contrast_keeps_the_precision_of_its_input() -> None:
    module = compiled(Small(drop=0.0), Supervise(modules=2, decoder="none", head="contrast"), verify="off").module.double().train()
    head, h, y = (
        module.get_submodule("supervise.0"),
        torch.rand(4, 8, 8, 8, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 0, 1, 1]),
    )
    assert head(h, None, y).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda h: head(h, None, y), h[:, :, :2, :2].detach().requires_grad_())
    soft = F.one_hot(y, 10).double()
    torch.testing.assert_close(head(h, None, soft), head(h, None, y))
