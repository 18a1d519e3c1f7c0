"""The least time of a step on a GPU: worked out by hand for single layers, and for costs of that GPU alone."""

import pytest
import torch
from torch import nn

from graphopt.cost import forecast
from graphopt.cost.devices import DEVICES
from graphopt.cost.roofline import PeakRates, operator_seconds, peak_rate

aten = torch.ops.aten
L4 = DEVICES["L4"]


@pytest.mark.parametrize(
    ("packet", "dtype", "rate"),
    [
        (aten.mm, torch.float32, L4.float32),
        (aten.mm, torch.bfloat16, L4.bfloat16),
        (aten.convolution, torch.float32, L4.tf32),
        (aten.convolution_backward, torch.float16, L4.bfloat16),
    ],
)
def test_the_peak_rate_follows_the_type(packet, dtype, rate):
    assert peak_rate(L4, packet, dtype) == rate


def test_an_operator_takes_the_longer_of_arithmetic_and_traffic():
    def product(n):
        a, b, out = torch.empty(n, n, device="meta"), torch.empty(n, n, device="meta"), torch.empty(n, n, device="meta")
        return operator_seconds(L4, aten.mm, (a, b), {}, [a, b, out], out)

    assert product(8) == pytest.approx(3 * 8 * 8 * 4 / L4.bandwidth)
    assert product(8192) == pytest.approx(2 * 8192**3 / L4.float32)
    x = torch.empty(1000, device="meta")
    assert operator_seconds(L4, aten.relu, (x,), {}, [x, x], x) == pytest.approx(2 * 4000 / L4.bandwidth)


def test_a_step_is_faster_on_the_faster_device_and_its_seconds_are_that_devices_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 3))
    costs = {name: forecast(net, (3, 8, 8), 64, device=DEVICES[name]) for name in ("L4", "H100")}
    seconds = {name: PeakRates(DEVICES[name]).seconds(cost) for name, cost in costs.items()}
    assert 0 < seconds["H100"] < seconds["L4"]
    # All of it is read and written, and views cost nothing.
    assert seconds["L4"] >= costs["L4"].moved_bytes / L4.bandwidth
    assert costs["L4"].to_dict()["roofline_seconds"] == seconds["L4"]
    for other in (forecast(net, (3, 8, 8), 64), costs["H100"]):
        with pytest.raises(ValueError, match="no forecast for L4"):
            PeakRates(L4).seconds(other)
