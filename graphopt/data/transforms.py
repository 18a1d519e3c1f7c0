"""From a PIL image to the tensor that the backbone takes, by timm's transforms on any shape and with current Pillow."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform  # type: ignore[attr-defined]  # re-exported without saying so
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from graphopt.data.datasets import source
from graphopt.errors import RunError
from graphopt.ir.inputs import crop_padding
from graphopt.spec import AugmentSpec, DataSpec

Step = Callable[[Any], Any]
#: elements that are normalised at a time: so many stay in a processor's cache between two of the operations
TOGETHER = 2**18


class Transform:
    """PIL image -> (C, H, W) float32, in parts: the image is decoded, changed as an image, and its pixels are normalised.

    Args:
        decode: gives a decoded image, from one that is perhaps only opened. steps: what follows, from image to image.
        mean, std: per channel, of pixels in 0..1. erase: what is done to the normalised tensor, if anything.
    """

    def __init__(
        self,
        decode: Step,
        steps: Sequence[Step],
        mean: Sequence[float],
        std: Sequence[float],
        erase: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.decode, self.steps, self.erase = decode, steps, erase
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def then(self, step: Callable[[Tensor], Tensor]) -> None:
        """Applies a further step to the tensor, after all others."""
        before = self.erase
        self.erase = step if before is None else transforms.Compose([before, step])

    @property
    def padded_crop(self) -> transforms.RandomCrop | None:
        """The step that pads an image and takes a random crop of its size, if there is one."""
        return next((step for step in self.steps if isinstance(step, transforms.RandomCrop) and step.padding), None)

    @property
    def flips(self) -> tuple[int, ...]:
        """The dimensions along which images are flipped at random: -1 from left to right, -2 from top to bottom."""
        kinds = {-1: transforms.RandomHorizontalFlip, -2: transforms.RandomVerticalFlip}
        return tuple(dim for dim, kind in kinds.items() if any(isinstance(step, kind) for step in self.steps))

    def surrounded(self, rows: int, columns: int, *, flipped: bool) -> "Transform":
        """The same with random crops that have so many more rows and columns; without flips, unless `flipped`."""
        other, crop = copy.copy(self), self.padded_crop
        assert crop is not None
        wider = transforms.RandomCrop((crop.size[0] + rows, crop.size[1] + columns), padding=crop.padding)
        left_out = () if flipped else (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
        other.steps = [wider if step is crop else step for step in self.steps if not isinstance(step, left_out)]
        return other

    def pixels(self, image: Any) -> Tensor:
        """(C, H, W) uint8 of a decoded image: all but normalisation."""
        for step in self.steps:
            image = step(image)
        image = _mode(image, "RGB" if len(self.mean) == 3 else "L")
        # channel by channel, which is how they are stored in the tensor
        planes = bytearray(b"".join(channel.tobytes() for channel in image.split()))
        return torch.frombuffer(planes, dtype=torch.uint8).view(-1, image.height, image.width)

    def normalized(self, pixels: Tensor) -> Tensor:
        """float32 of the same shape, (N, C, H, W) or (C, H, W): `(pixels / 255 - mean) / std`, rounded as torchvision rounds it."""
        result = torch.empty(pixels.shape)
        rows = max(1, TOGETHER // pixels[0].numel()) if pixels.ndim == 4 else len(pixels)
        for part, given in zip(result.split(rows), pixels.split(rows), strict=True):
            part.copy_(given).div_(255).sub_(self.mean).div_(self.std)
        return result

    def tensor(self, image: Any) -> Tensor:
        """(C, H, W) float32 of a decoded image."""
        result = self.normalized(self.pixels(image))
        return result if self.erase is None else self.erase(result)

    def __call__(self, image: Any) -> Tensor:
        return self.tensor(self.decode(image))


class LowFrequency:
    """An image's lowest frequencies, as an image of their number: (C, H, W) to (C, height, width), with the same mean.

    EfficientTrain's low-frequency cropping (arXiv 2211.09703, section 4.1): the centre of the shifted spectrum, transformed back.
    """

    def __init__(self, height: int, width: int) -> None:
        self.size = height, width

    def __call__(self, image: Tensor) -> Tensor:
        spectrum = torch.fft.fftshift(torch.fft.fft2(image, norm="forward"), dim=(-2, -1))
        for dim, kept in zip((-2, -1), self.size, strict=True):
            # The frequency 0 stands at half the length, before and after.
            spectrum = spectrum.narrow(dim, spectrum.shape[dim] // 2 - kept // 2, kept)
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward").real


def eval_transform(spec: DataSpec, input: tuple[int, ...]) -> Transform:
    """PIL image -> (C, H, W): resized so that `crop_pct` of it remains, centre crop, normalised."""
    steps = _geometry(spec, input)
    return Transform(_decoder(spec, input, _whole), steps, *_statistics(spec, input[0]))


def train_transform(spec: DataSpec, input: tuple[int, ...]) -> Transform:
    """PIL image -> (C, H, W) with the spec's augmentation by timm; without any, exactly as in evaluation."""
    augment = spec.augment
    if not augment.redraws and augment.crop == "none":
        return eval_transform(spec, input)
    mean, std = _statistics(spec, input[0])
    options = {**_options(augment), "interpolation": augment.interpolation or spec.interpolation, "mean": mean, "std": std}
    try:
        first, second, last = create_transform((input[0], input[1], input[2]), is_training=True, separate=True, **options)
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise RunError(f"timm refused the augmentation: {error}", where="data.augment") from error
    count = 2 if augment.crop in ("rkrc", "rkrr") else 1
    crops, flips = first.transforms[:count], first.transforms[count:]
    colored = augment.color_jitter or augment.auto_augment or augment.grayscale or augment.blur
    colors = list(second.transforms) if colored else []
    _fix_posterize(colors)
    # timm's policies take RGB images only: where a backbone takes grey ones, the conversion to grey comes after them.
    decode: Step = rgb if colors else _whole
    if augment.crop == "squash":
        steps = [transforms.Resize(input[1:], transforms.InterpolationMode(spec.interpolation))]
    elif augment.crop == "resized" and spec.decode == "draft":
        decode, steps = DraftedCrop(crops[0], decode), []  # cropped already
    elif augment.crop in ("resized", "rkrc", "rkrr"):
        steps = crops
    else:
        steps = _geometry(spec, input)
        decode = _decoder(spec, input, decode)
        if augment.crop == "pad":
            steps.append(transforms.RandomCrop(input[1:], padding=crop_padding(input)))
    erase = next((step for step in last.transforms if isinstance(step, RandomErasing)), None)
    return Transform(decode, [*steps, *flips, *colors], mean, std, erase)


def _options(augment: AugmentSpec) -> dict[str, Any]:
    """The options of timm's transform factory that follow from the spec's alone."""
    names = {"color_jitter_prob": "color_jitter_prob", "grayscale": "grayscale_prob", "blur": "gaussian_blur_prob"}
    names |= {"erase": "re_prob", "erase_mode": "re_mode", "erase_count": "re_count"}
    names |= {name: name for name in ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment")}
    crop = augment.crop if augment.crop in ("rkrc", "rkrr") else None
    return {"train_crop_mode": crop, **{theirs: getattr(augment, ours) for ours, theirs in names.items()}}


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


def _decoder(spec: DataSpec, input: tuple[int, ...], decode: Step) -> Step:
    """`decode`, of as much of an image as its resizing for evaluation needs if the spec says so."""
    height, width = (math.ceil(side / spec.crop_pct) for side in input[1:])
    return Drafted(width, height, decode) if spec.decode == "draft" else decode


class Drafted:
    """Decodes a JPEG at the smallest of 1, 1/2, 1/4 and 1/8 of its size that has `width` x `height` pixels, other images whole.

    libjpeg leaves the finest frequencies out, which takes less time. Where resizing would shrink the image that much, it is then done in
    two steps, and pixels differ a little from those of one step.
    """

    def __init__(self, width: int, height: int, decode: Step) -> None:
        self.width, self.height, self.decode = width, height, decode

    def __call__(self, image: Any) -> Any:
        image.draft("RGB", (self.width, self.height))
        return self.decode(image)


class DraftedCrop:
    """Draws a random resized crop, then decodes a JPEG at the smallest size at which the crop has as many pixels as it is resized to.

    The area is the same as without, up to a pixel; see `Drafted`. An image that is decoded whole gives the same pixels as without.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, decode: Step) -> None:
        self.crop, self.decode = crop, decode

    def __call__(self, image: Any) -> Any:
        size, (height, width) = image.size, self.crop.size
        top, left, h, w = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        factor = min(h // height, w // width)
        drafted = image.draft("RGB", (size[0] // factor, size[1] // factor)) if factor > 1 else None
        decoded = self.decode(image)
        if drafted is None or decoded.size == size:
            return functional.resized_crop(decoded, top, left, h, w, self.crop.size, mode)
        x, y = drafted[1][2] / size[0], drafted[1][3] / size[1]  # the last pixels of a row or column may be parts
        box = left * x, top * y, min((left + w) * x, decoded.width), min((top + h) * y, decoded.height)
        return decoded.resize((width, height), Image.Resampling[mode.value.upper()], box=box)


def _mode(image: Any, mode: str) -> Any:
    return image if image.mode == mode else image.convert(mode)


def rgb(image: Any) -> Any:
    """Decoded, in RGB."""
    image.load()
    return _mode(image, "RGB")


def _whole(image: Any) -> Any:
    """Decoded, in RGB or grey: of a palette's numbers, or of transparent pixels, no mean can be taken."""
    image.load()
    return image if image.mode == "L" else _mode(image, "RGB")
