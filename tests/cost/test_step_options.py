"""The forecast of a step in other memory formats, dtypes and numbers of micro-batches equals a real one."""

import pytest
from torch import nn

from graphopt.cost import forecast, measure
from tests.cost.test_step import build, live, plain


@pytest.mark.parametrize("amp", ["bfloat16"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_vit"])
def test_equals_a_real_step_under_autocast(name, amp):
    module = build(name)
    size = 64 if "resnet" in name else 160
    assert plain(forecast(module, (3, size, size), 2, amp=amp)) == live(measure(module, (3, size, size), 2, amp=amp))


def test_micro_batches_are_there_one_at_a_time_with_the_gradients_of_those_before():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 50), nn.Linear(50, 5))
    one, two, three, many = (forecast(module, (3, 8, 8), 40 * n, accumulate=n) for n in (1, 2, 3, 5))
    assert plain(many) == live(measure(module, (3, 8, 8), 200, accumulate=5))
    assert (many.batch, many.input_bytes, many.flops, many.product_flops) == (200, one.input_bytes, 5 * one.flops, 5 * one.product_flops)
    assert many.moved_bytes - two.moved_bytes == 3 * (three.moved_bytes - two.moved_bytes)
    assert many.kernels - two.kernels == 3 * (three.kernels - two.kernels)
    assert one.peak_bytes < many.peak_bytes <= one.peak_bytes + one.gradient_bytes
    assert many.peak_bytes == two.peak_bytes


@pytest.mark.parametrize(("name", "size"), [("torchvision/resnet18", 64), ("timm/convnext_atto", 64), ("timm/test_vit", 160)])
def test_channels_last_equals_a_real_step_and_leaves_the_module_as_it_is(name, size):
    module = build(name)
    nhwc = forecast(module, (3, size, size), 2, channels_last=True)
    assert plain(nhwc) == live(measure(module, (3, size, size), 2, channels_last=True))
    assert all(p.is_contiguous() for p in module.parameters())
