"""blurpool: what is downsampled is blurred first."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import PassError
from graphopt.passes.blurpool import BlurPool
from graphopt.passes.layers import Blur
from tests.support.small_passes import BACKBONES, trained


def test_the_kernel_is_a_row_of_pascal_s_triangle_by_itself() -> None:
    assert torch.equal(Blur(3, (1, 1)).kernel, torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)
    constant = torch.full((1, 2, 5, 5), 3.0)
    assert torch.equal(Blur(4, (2, 2))(constant), constant[..., :3, :3])


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (1, 1), (2, 7)])
def test_it_halves_as_the_pool_did(size: tuple[int, int]) -> None:
    pool = nn.MaxPool2d(3, 2, 1)
    assert Blur(3, (2, 2))(nn.MaxPool2d(3, 1, 1)(torch.randn(1, 2, *size))).shape == pool(torch.randn(1, 2, *size)).shape


def test_a_pool_and_a_strided_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.MaxPool2d(2, 2), nn.Conv2d(16, 4, 3, 2, 1), nn.Flatten(), nn.Linear(16, 2))
    plan = graphopt.compile(model, BlurPool(), input=(3, 16, 16), costs=False)
    assert plan.report.passes[0].figures == {"blurs": 2}  # the first convolution reads the image
    blur, x = Blur(3, (1, 1)), torch.randn(2, 3, 16, 16)
    pooled = F.max_pool2d(model[0](x), 2, 1)
    expected = model[3:](model[2](blur(Blur(3, (2, 2))(pooled))))
    torch.testing.assert_close(plan.module(x), expected)
    assert plan.module.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(PassError, match=r"graphopt\.save"):
        plan.export()


def test_a_shifted_image_changes_less() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=4).eval(), torch.randn(2, 3, 32, 32)

    def change(module: nn.Module) -> float:
        with torch.no_grad():
            features = [module(image) for image in (x, x.roll(1, -1))]
        return float((features[0] - features[1]).norm() / features[0].norm())

    plan = graphopt.compile(model, BlurPool(), input=(3, 32, 32), verify="fast", costs=False)
    assert change(plan.module.eval()) < change(model)


def test_it_trains_and_is_stored_with_its_spec(tmp_path) -> None:
    model, input = BACKBONES["resnet"]()
    plan = graphopt.compile(model, BlurPool(), input=input, verify="full", costs=False)
    trained(plan, input)
    graphopt.save(plan, tmp_path / "blurred.safetensors")
    other = graphopt.compile(model, BlurPool(), input=input, costs=False)
    x = torch.randn(2, *input)
    loaded = graphopt.load(tmp_path / "blurred.safetensors", plan=other)
    assert torch.equal(loaded.eval()(x), plan.module.eval()(x))


def test_nothing_to_blur_is_refused() -> None:
    model, input = BACKBONES["vit"]()
    with pytest.raises(PassError, match="or a strided convolution"):
        graphopt.compile(model, BlurPool(select="blocks"), input=input, costs=False)
