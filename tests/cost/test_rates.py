"""Seconds from figures: rates come back out of the times they made, and the forecast of a run is the sum of its steps."""

import numpy as np
import pytest
import torch

from graphopt.cost import Rates, forecast, measure_rates, rates
from graphopt.cost.rates import fitted
from graphopt.models import cifar_resnet as cifar


@pytest.fixture(scope="module")
def costs():
    networks = [(cifar.build(name), batch) for name, batch in (("resnet8", 1), ("resnet20", 8), ("vgg11", 4), ("resnet8", 64))]
    networks += [(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 64), torch.nn.Linear(64, 10)), 32)]
    return [forecast(network, (3, 32, 32), batch) for network, batch in networks]


def test_rates_come_back_out_of_the_times_they_made(costs):
    made = Rates(flop=2e-11, byte=3e-10, kernel=5e-6, error=0.0, device="cpu", product=7e-11)
    found = fitted(costs, np.array([made.seconds(c) for c in costs]), "cpu")
    assert found.flop == pytest.approx(made.flop, rel=1e-3)
    assert found.product == pytest.approx(made.product, rel=1e-3)
    assert found.byte == pytest.approx(made.byte, rel=1e-3)
    assert found.kernel == pytest.approx(made.kernel, rel=1e-3)
    assert found.error < 1e-6


def test_no_rate_is_negative(costs):
    found = fitted(costs, np.array([1.0, 0.1, 0.01, 0.001, 0.0001]), "cpu")
    assert min(found.flop, found.product, found.byte, found.kernel) >= 0


def test_a_machine_is_measured_without_touching_its_random_numbers(monkeypatch):
    networks = [(make, input, 2) for make, input, _ in rates._networks()]
    monkeypatch.setattr(rates, "STEPS", 1)
    monkeypatch.setattr(rates, "_networks", lambda: networks)  # in small batches
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = measure_rates()
    assert torch.equal(torch.get_rng_state(), state)
    assert found.device == "cpu"
    assert found.seconds(forecast(cifar.build("resnet20"), (3, 32, 32), 64)) > 0


def test_products_are_all_flops_that_no_convolution_has():
    attention = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = forecast(attention, (5, 8), 4, loss=lambda output, _: output.sum())
    assert found.product_flops == found.flops > 0
    convolution = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ConvTranspose2d(4, 2, 3), torch.nn.Flatten(), torch.nn.Linear(128, 3)
    )
    found = forecast(convolution, (3, 8, 8), 5)
    assert found.product_flops == 3 * 2 * 5 * 128 * 3, "of the last layer alone: forward, and both gradients"


def test_views_are_no_kernels():
    class Views(torch.nn.Module):
        def __init__(self, views):
            super().__init__()
            self.views, self.fc = views, torch.nn.Linear(12, 3)

        def forward(self, x):
            for _ in range(self.views):
                x = x.view(4, 3, 4).transpose(1, 2).transpose(1, 2).view(4, 12)
            return self.fc(x)

    plain, viewed = (forecast(Views(n), (12,), 4) for n in (0, 5))
    assert plain.kernels == viewed.kernels
    assert plain.moved_bytes == viewed.moved_bytes
