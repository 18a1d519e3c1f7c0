"""Cached features in eight bits."""

from __future__ import annotations

import pytest
import torch

from graphopt.planning.run_cost import cache_bytes
from graphopt.runtime.quantized import channels, pack, stored_bytes, unpack
from tests.train.features import features_of, plan_of, run, weights


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 6), (9,)])
def test_values_come_back_to_half_a_step_of_their_channel(shape):
    torch.manual_seed(0)
    features = torch.randn(5, *shape) * torch.logspace(-3, 3, 5).view(-1, *[1] * len(shape))
    packed = pack(features)
    assert packed.dtype == torch.uint8
    assert packed[0].numel() == stored_bytes(shape, "int8") == 4 * channels(shape) + features[0].numel()
    found = unpack(packed, shape)
    assert found.shape == features.shape
    axes = {3: (2, 3), 2: (1,), 1: (1,)}[len(shape)]
    step = features.abs().amax(axes, keepdim=True) / 127
    assert ((found - features).abs() <= 0.5001 * step).all()


def test_zeros_stay_zeros():
    assert not unpack(pack(torch.zeros(2, 3, 4, 4)), (3, 4, 4)).any()


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_run_trains_on_them_and_says_how_far_off_they_are(tmp_path, cache):
    folder = run(tmp_path, cache=cache, dtype="int8")
    reference = weights(run(tmp_path, "reference"))
    records = features_of(folder)
    plan = plan_of(dtype="int8").phase_at(1, 5)
    size = cache_bytes(plan.needs.features, 80)
    assert records[0]["bytes"] == size == 80 * (8 * 8 * 8 + 4 * 8), "as forecast, to the byte"
    assert [r["filled_from"] for r in records] == ["images", "features"]
    assert all(0 < r["error"] < 0.02 for r in records)
    found = weights(folder)
    assert all((found[k].double() - reference[k].double()).abs().max() < 0.1 for k in found)
