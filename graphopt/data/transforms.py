"""From a PIL image to the tensor that the backbone takes, by timm's transforms on any shape and with current Pillow."""

from collections.abc import Callable
from typing import Any

from timm.data import auto_augment, create_transform  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor
from torchvision import transforms

from graphopt.data.datasets import source
from graphopt.errors import RunError
from graphopt.spec import AugmentSpec, DataSpec

Transform = Callable[[Any], Tensor]


def is_random(augment: AugmentSpec) -> bool:
    """Whether the transform can give one image different tensors; mixup and CutMix, which mix batches, do not count."""
    return augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0}).random


def eval_transform(spec: DataSpec, input: tuple[int, ...]) -> Transform:
    """PIL image -> (C, H, W): resized so that `crop_pct` of it remains, centre crop, normalised."""
    mean, std = _statistics(spec, input[0])
    return transforms.Compose([*_geometry(spec, input), *_colors(input[0]), transforms.ToTensor(), transforms.Normalize(mean, std)])


def train_transform(spec: DataSpec, input: tuple[int, ...]) -> Transform:
    """PIL image -> (C, H, W) with the spec's augmentation by timm; without any, exactly as in evaluation."""
    augment = spec.augment
    if not is_random(augment):
        return eval_transform(spec, input)
    mean, std = _statistics(spec, input[0])
    same = augment.model_dump(include={"scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment"})
    options = {**same, "re_prob": augment.erase, "interpolation": spec.interpolation, "mean": mean, "std": std}
    try:
        first, second, last = create_transform((input[0], input[1], input[2]), is_training=True, separate=True, **options)
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise RunError(f"timm refused the augmentation: {error}", where="data.augment") from error
    steps = list(first.transforms)
    if augment.crop != "resized":
        # timm's first step is its random resized crop; flips follow it.
        padded = [transforms.RandomCrop(input[1:], padding=max(input[1:]) // 8)] if augment.crop == "pad" else []
        steps[:1] = [*_geometry(spec, input), *padded]
    _fix_posterize(second)
    # timm's policies take RGB images only: the conversion to grey comes after them.
    return transforms.Compose([_rgb, *steps, second, *_colors(input[0])[1:], last])


def _statistics(spec: DataSpec, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the spec's, else the data set's."""
    known = source(spec.name)
    return _per_channel(spec.mean or known.mean, channels, "mean"), _per_channel(spec.std or known.std, channels, "std")


def _per_channel(values: tuple[float, ...], channels: int, name: str) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (sum(values) / len(values),)
    raise RunError(f"{len(values)} values for {channels} channels", where=f"data.{name}")


def _fix_posterize(transform: Any) -> None:
    """Lets timm's policies posterize to one bit at least: they may ask for 0 bits, which Pillow refuses since version 12."""
    fields = ("transforms", "ops", "policy")
    parts = transform if isinstance(transform, list) else [part for name in fields for part in getattr(transform, name, [])]
    for part in parts:
        if getattr(part, "aug_fn", None) is auto_augment.posterize:
            part.aug_fn = _posterize
        _fix_posterize(part)


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    return auto_augment.posterize(image, max(1, bits))


def _geometry(spec: DataSpec, input: tuple[int, ...]) -> list[Any]:
    """The steps of timm that resize and crop for evaluation."""
    size = (input[0], input[1], input[2])
    steps = create_transform(size, is_training=False, interpolation=spec.interpolation, crop_pct=spec.crop_pct).transforms
    # torchvision's two, or timm's own in their place; not those that make tensors.
    kinds = (transforms.Resize, transforms.CenterCrop)
    return [s for s in steps if isinstance(s, kinds) or (type(s).__module__.startswith("timm.") and "Tensor" not in type(s).__name__)]


def _rgb(image: Any) -> Any:
    return image.convert("RGB")


def _colors(channels: int) -> list[Any]:
    return [_rgb] if channels == 3 else [_rgb, transforms.Grayscale()]
