"""Cached maps that are cropped at random, in the place of images that are padded and cropped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.cli import main
from graphopt.data.transforms import eval_transform
from graphopt.errors import PassError, RunError
from graphopt.passes.drop import Drop
from graphopt.passes.resize import Resize
from graphopt.planning.run_cost import forecast_run
from graphopt.spec import AugmentSpec, DataSpec
from graphopt.train import train
from graphopt.train.phase import Phase
from tests.support.backbones import Small
from tests.train.features import DATA, TRAIN, cache_of, equal, features_of, plan_of, run, weights

PADDED = DATA.model_copy(update={"augment": AugmentSpec(crop="pad")})
FLIPPED = DATA.model_copy(update={"augment": AugmentSpec(crop="pad", hflip=0.5)})
SIDE = 16  # padded by two pixels


class Pointwise(nn.Module):
    """Its features of a crop are crops of its features, to the borders: no layer of the prefix reads a neighbour."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, stride, stride), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(torch.relu(self.one(x))).mean((2, 3)))


def feed_of(folder: Path, stride: int, data: DataSpec, **options: Any):
    model = Pointwise(stride)
    plan = graphopt.compile(model, [Drop(upto="one", crops=True, force=True, **options)], input=(3, SIDE, SIDE), verify="off", costs=False)
    cache = cache_of(folder, plan, data)
    return plan, cache, cache.prepare(plan, {})[0]


def offset(plan: graphopt.Plan, image: Tensor, features: Tensor) -> tuple[int, int] | None:
    """Where in the padded image (C, H, W) the crop lies of which these are the features."""
    for y in range(image.shape[1] - SIDE + 1):
        for x in range(image.shape[2] - SIDE + 1):
            if torch.allclose(plan.prefix(image[None, :, y : y + SIDE, x : x + SIDE])[0], features, atol=1e-6):
                return y, x
    return None


@pytest.mark.parametrize("stride", [1, 2])
def test_features_are_those_of_random_crops_of_the_padded_image(tmp_path: Path, stride: int) -> None:
    torch.manual_seed(0)
    plan, cache, feed = feed_of(tmp_path, stride, PADDED)
    padding = nn.ConstantPad2d(2, float(-cache.samples.transform.mean[0] / cache.samples.transform.std[0]))
    still = cache.samples.prepared(eval_transform(DATA, (3, SIDE, SIDE)), deterministic=True)
    found = []
    for epoch in range(3):
        batch = next(iter(feed.batches(epoch)))
        assert batch.input.shape[1:] == plan.prefix(torch.zeros(1, 3, SIDE, SIDE)).shape[1:]
        for sample, features in zip(batch.sample.tolist()[:6], batch.input, strict=False):
            found.append(offset(plan, padding(still[(0, sample)][1]), features))
    assert None not in found
    assert len(set(found)) > 3
    assert {side % stride for crop in found for side in crop} == {0}, "by whole positions of the map"
    again = next(iter(feed.batches(2)))
    assert torch.equal(again.input, batch.input), "a function of seed, epoch and sample"


@pytest.mark.parametrize("flips", [("hflip",), ("hflip", "vflip")])
def test_both_flips_are_cached_and_come_in_turn(tmp_path: Path, flips: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    data = DATA.model_copy(update={"augment": AugmentSpec(crop="pad", **dict.fromkeys(flips, 0.5))})
    _, cache, feed = feed_of(tmp_path, 1, data, views=2 ** len(flips))
    whole, count = feed.entry.features, len(cache.samples)
    views = whole.view(-1, count, *whole.shape[1:])
    assert torch.allclose(views[1], views[0].flip(-1), atol=1e-6)
    if len(flips) == 2:
        assert torch.allclose(views[2], views[0].flip(-2), atol=1e-6)
        assert torch.allclose(views[3], views[0].flip(-1, -2), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"views": 2}, 2 * 8 * 100 * 4),
        ({"refresh": 2}, 8 * 100 * 4),
        ({"views": 2, "dtype": "float16", "cache": "disk"}, 2 * 8 * 100 * 2),
        ({"views": 2, "dtype": "int8"}, 2 * 8 * (100 + 4)),
    ],
)
def test_storage_is_forecast_to_the_byte(tmp_path: Path, options: dict[str, Any], row: int) -> None:
    options = {**options, "crops": True}
    found = [record["bytes"] for record in features_of(run(tmp_path, data=FLIPPED, **options))]
    assert found == [80 * row] * 2, "maps of images that are larger by two pixels"
    cost = forecast_run(plan_of(**options), TRAIN, samples=80, evaluated=20)
    assert [phase.feature_bytes for phase in cost.phases[1:]] == found


def test_the_forecast_of_a_run_shows_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = '[backbone]\nsource = "cifar"\nname = "resnet8"\ninput = [3, 16, 16]\n'
    drop = '[[pass]]\nuse = "drop"\nupto = "layer1"\ncrops = true\nviews = 2\nwhen = { epoch = 1 }\n'
    data = '[data]\nname = "digits"\ntrain_limit = 100\naugment = { crop = "pad", hflip = 0.5 }\n[train]\nepochs = 2\nbatch = 20\n'
    Path("s.toml").write_text(backbone + drop + data)
    assert main(["check", "s.toml"]) == 0
    said = capsys.readouterr().out
    assert f"({100 * 2 * 16 * 20 * 20 * 4:,} bytes)" in said
    assert "caches 16x20x20 features: 25.0 KiB per sample in float32 for each of 2 views" in said


def test_a_stopped_run_goes_on_with_the_crops_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cropped = partial(run, tmp_path, data=FLIPPED, crops=True, refresh=2)
    whole, step = weights(cropped("whole")), Phase.step

    def stopping(phase, batches, done):
        if done == 12:
            raise KeyboardInterrupt
        return step(phase, batches, done)

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            cropped("stopped")
    assert equal(weights(cropped("stopped", resume=True)), whole)


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (DATA, {}, "these are not"),
        (FLIPPED, {"cache": "disk"}, r"no flipped features.*views = 2"),
        (FLIPPED, {"views": 3}, r"views = 2"),
        (DATA.model_copy(update={"augment": AugmentSpec(crop="resized")}), {"refresh": 4}, '"pad"'),
    ],
)
def test_augmentation_that_crops_cannot_stand_for_is_refused_before_the_first_step(
    tmp_path: Path, data: DataSpec, options: dict, says: str
) -> None:
    with pytest.raises(RunError, match=says):
        run(tmp_path, data=data, crops=True, **options)
    assert not (tmp_path / "run" / "last.pt").exists()


class Gated(Small):
    """The second half of its blocks is weighted by a mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        return self.fc(self.blocks[3](self.blocks[2](x)).mean((2, 3)))


def test_a_prefix_that_does_not_move_with_the_image_is_refused_or_left_out() -> None:
    compile = partial(graphopt.compile, Gated(drop=0.0), input=(3, 8, 8), verify="off", costs=False)
    with pytest.raises(PassError, match=r"crops: mean is taken over positions.*refresh = 4"):
        compile([Drop(upto="blocks.2", crops=True)])
    plan = compile([Drop(when={"score": "change", "below": 0.1}, crops=True)])
    (item,) = plan.matched
    assert [region.name for region in item.match.regions] == ["blocks.0", "blocks.1"]
    assert any("mean is taken over positions" in note.message for note in item.match.diagnostics)


def test_crops_need_a_cache() -> None:
    with pytest.raises(ValueError, match="they need a cache"):
        Drop(upto="blocks.0", crops=True, cache="none")


LOW = Resize(size=8, how="low-frequency", when={"epoch": 1, "until": 2})
FLIPS_LATER = Resize(size=8, augment={"hflip": 0.5}, when={"epoch": 1, "until": 2})


@pytest.mark.parametrize(
    ("resize", "data", "options", "says"),
    [
        (LOW, PADDED, {"crops": True}, "another size after they are cropped"),
        (FLIPS_LATER, DATA, {"cache": "disk"}, "random augmentation"),
        (FLIPS_LATER, PADDED, {"crops": True, "views": 1}, "no flipped features"),
    ],
)
def test_what_a_later_phase_makes_of_the_images_is_refused_before_the_first_step(
    tmp_path: Path, resize: Resize, data: DataSpec, options: dict[str, Any], says: str
) -> None:
    passes = [resize, Drop(upto="blocks.0", when={"epoch": 1}, force=True, **options)]
    plan = graphopt.compile(Small(drop=0.0), passes, input=(3, 16, 16), verify="off", costs=False)
    with pytest.raises(RunError, match=says):
        train(plan, tmp_path / "run", settings=TRAIN, data=data)
    assert not (tmp_path / "run" / "last.pt").exists()
