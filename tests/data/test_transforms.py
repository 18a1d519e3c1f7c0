"""Pixels: those of torchvision's and timm's own steps, bit for bit; of drafts, nearly."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from graphopt.data.randomness import preserved, reseed
from graphopt.data.transforms import eval_transform, train_transform
from graphopt.spec import AugmentSpec, DataSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def photo(width: int = 90, height: int = 70, mode: str = "RGB", kind: str = "JPEG") -> Image.Image:
    """A smooth picture in a file, opened and not decoded."""
    small = Image.fromarray(np.random.RandomState(0).randint(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return Image.open(file)


def spec(**changes: Any) -> DataSpec:
    return DataSpec(**{"mean": MEAN, "std": STD, **changes})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_evaluation_is_torchvisions(mode: str) -> None:
    reference = transforms.Compose(
        [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    image = photo(mode=mode, kind="PNG")
    assert torch.equal(eval_transform(spec(crop_pct=0.8), (3, 32, 32))(image), reference(image.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_is_what_remains_of_colors(mode: str, channels: int) -> None:
    image = photo(mode=mode, kind="PNG")
    grey = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.Grayscale(channels), transforms.ToTensor()])
    plain = spec(mean=(0.0,), std=(1.0,))
    if channels == 1 or mode == "L":
        assert torch.equal(eval_transform(plain, (channels, 32, 32))(image), grey(image.convert("RGB")))


@pytest.mark.parametrize(
    "augment", [{"hflip": 0.5}, {"hflip": 0.5, "color_jitter": 0.4, "erase": 0.5}, {"auto_augment": "rand-m9", "scale": (0.5, 1.0)}]
)
def test_training_is_timms(augment: dict[str, Any]) -> None:
    same = {"re_prob" if name == "erase" else name: value for name, value in augment.items()}
    options = {"hflip": 0.0, "color_jitter": 0.0, "interpolation": "bilinear", "mean": MEAN, "std": STD, **same}
    reference = create_transform((3, 32, 32), is_training=True, **options)
    mine = train_transform(spec(augment=AugmentSpec(crop="resized", **augment)), (3, 32, 32))
    for seed in range(8):
        with preserved():
            reseed(seed)
            expected = reference(photo().convert("RGB"))
            reseed(seed)
            assert torch.equal(mine(photo()), expected)


@pytest.mark.parametrize(
    ("augment", "theirs"),
    [
        ({"crop": "rkrc", "scale": (0.5, 1.0), "ratio": (0.9, 1.1)}, {"train_crop_mode": "rkrc"}),
        ({"crop": "rkrr", "scale": (0.5, 1.0), "ratio": (0.9, 1.1), "hflip": 0.5}, {"train_crop_mode": "rkrr"}),
        ({"crop": "resized", "interpolation": "random"}, {}),
        ({"crop": "resized", "grayscale": 0.5, "blur": 0.5}, {"grayscale_prob": 0.5, "gaussian_blur_prob": 0.5}),
        ({"crop": "resized", "color_jitter": 0.4, "color_jitter_prob": 0.5}, {}),
        (
            {"crop": "resized", "erase": 0.9, "erase_mode": "pixel", "erase_count": 3},
            {"re_prob": 0.9, "re_mode": "pixel", "re_count": 3, "color_jitter": None},
        ),
    ],
    ids=["rkrc", "rkrr", "random interpolation", "grey and blur", "jitter", "erase"],
)
def test_timms_switches_are_timms(augment: dict[str, Any], theirs: dict[str, Any]) -> None:
    same = {key: augment[key] for key in augment.keys() & {"scale", "ratio", "hflip", "interpolation", "color_jitter", "color_jitter_prob"}}
    options = {"hflip": 0.0, "color_jitter": 0.0, "interpolation": "bilinear", "mean": MEAN, "std": STD, **same, **theirs}
    reference = create_transform((3, 32, 32), is_training=True, **options)
    mine = train_transform(spec(augment=AugmentSpec(**augment)), (3, 32, 32))
    for seed in range(4):
        with preserved():
            reseed(seed)
            expected = reference(photo().convert("RGB"))
            reseed(seed)
            assert torch.equal(mine(photo()), expected)


def test_squashed_images_are_timms_without_augmentation() -> None:
    reference = create_transform((3, 32, 24), is_training=True, no_aug=True, interpolation="bicubic", mean=MEAN, std=STD)
    mine = train_transform(spec(augment=AugmentSpec(crop="squash"), interpolation="bicubic", crop_pct=0.8), (3, 32, 24))
    assert torch.equal(mine(photo()), reference(photo().convert("RGB")))


def test_a_batch_is_normalised_as_its_images() -> None:
    transform = eval_transform(spec(), (3, 20, 20))
    pixels = torch.randint(0, 256, (700, 3, 20, 20), dtype=torch.uint8)
    assert torch.equal(transform.normalized(pixels), torch.stack([transform.normalized(one) for one in pixels]))


AUGMENTS = {"evaluation": AugmentSpec(), "pad": AugmentSpec(crop="pad", hflip=0.5), "resized": AugmentSpec(crop="resized", hflip=0.5)}


def pixels(decode: str, augment: AugmentSpec, image: Image.Image, seed: int = 0, **changes: Any) -> Tensor:
    transform = train_transform(spec(decode=decode, augment=augment, **changes), (3, 32, 32))
    with preserved():
        reseed(seed)
        return transform.pixels(transform.decode(image)).float()


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_draft_shows_the_same(augment: str, mode: str) -> None:
    for seed in range(8):
        image = photo(540, 400, mode)
        whole, draft = (pixels(d, AUGMENTS[augment], i, seed) for d, i in (("whole", photo(540, 400, mode)), ("draft", image)))
        assert image.size < (540, 400)  # decoded at a fraction
        assert not torch.equal(whole, draft)
        assert (whole - draft).abs().mean() < 2  # of 255; a shift by one pixel makes 5 to 10


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize(("kind", "size"), [("JPEG", (60, 44)), ("PNG", (200, 150))])
def test_a_draft_of_what_cannot_be_smaller_is_the_same(augment: str, kind: str, size: tuple[int, int]) -> None:
    for seed in range(4):
        one, other = (pixels(decode, AUGMENTS[augment], photo(*size, kind=kind), seed) for decode in ("whole", "draft"))
        assert torch.equal(one, other)


@pytest.mark.parametrize(("crop_pct", "expected"), [(1.0, (68, 50)), (0.5, (135, 100))])
def test_a_draft_has_the_pixels_that_evaluation_resizes(crop_pct: float, expected: tuple[int, int]) -> None:
    image = photo(540, 400)
    pixels("draft", AugmentSpec(), image, crop_pct=crop_pct)
    assert image.size == expected
