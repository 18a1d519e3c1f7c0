"""`[data]` and `[data.augment]`: the images of a run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graphopt.spec.kinds import Alpha, Count, Deviations, Fraction, Interval, Means, Policy, Positive, Shares, Table
from graphopt.units import Size


class AugmentSpec(Table):
    """`[data.augment]`: augmentation of training images, by timm's transform and mixup factories. All off by default."""

    crop: Literal["none", "pad", "resized", "rkrc", "rkrr", "squash"] = Field(
        default="none",
        description="pad: by an eighth, then a random crop (CIFAR); resized: random resized crop (ImageNet); rkrc, rkrr: timm's resize "
        "that keeps the ratio, then a centre or a random crop; squash: the whole image, whatever its ratio",
    )
    scale: Interval = Field(default=(0.08, 1.0), description="area of the image that a random crop takes")
    ratio: Interval = Field(default=(0.75, 4 / 3), description="aspect ratio of a random crop; of rkrc and rkrr, the factor on it")
    interpolation: Literal["nearest", "bilinear", "bicubic", "random"] | None = Field(
        default=None, description="of resized, rkrc, rkrr; random: bilinear or bicubic, drawn for each image; default: that of [data]"
    )
    hflip: Fraction = Field(default=0.0, description="probability of a horizontal flip")
    vflip: Fraction = Field(default=0.0, description="probability of a vertical flip")
    color_jitter: Annotated[float, Field(ge=0, le=10)] = Field(default=0.0, description="strength of the color jitter")
    color_jitter_prob: Fraction | None = Field(default=None, description="probability of the color jitter; default: always")
    grayscale: Fraction = Field(default=0.0, description="probability of an image without colors")
    blur: Fraction = Field(default=0.0, description="probability of a Gaussian blur")
    auto_augment: Policy | None = Field(default=None, description='timm\'s policy text, e.g. "rand-m9-mstd0.5-inc1"')
    erase: Fraction = Field(default=0.0, description="probability of random erasing")
    erase_mode: Literal["const", "rand", "pixel"] = Field(
        default="const", description="what erased pixels become: the mean, one random color, or a random color each"
    )
    erase_count: Annotated[int, Field(ge=1, le=100)] = Field(default=1, description="rectangles erased at most")
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(
        default=1,
        description="how often an epoch takes an image, with other draws each time, on several processes; it has no more steps, so it "
        "takes that part of the images",
    )
    mixup: Alpha = Field(default=0.0, description="mixup's alpha; 0 is off; pairs images of one process's micro-batch")
    cutmix: Alpha = Field(default=0.0, description="CutMix's alpha; 0 is off; pairs as mixup")
    cutmix_minmax: Shares | None = Field(
        default=None, description="least and largest share of a side that CutMix cuts; turns it on, in the place of cutmix"
    )
    mixup_prob: Fraction = Field(default=1.0, description="probability that a batch (or pair, or element) is mixed")
    mixup_switch_prob: Fraction = Field(default=0.5, description="where both are on, the probability of CutMix")
    mixup_mode: Literal["batch", "pair", "elem"] = Field(default="batch", description="one draw for each batch, pair or element")
    mixup_off_epoch: Count = Field(default=0, description="first epoch without mixup and CutMix; 0: they stay on")

    @model_validator(mode="after")
    def _varied(self) -> Self:
        if self.repeats > 1 and not self.redraws:
            raise ValueError("repeats takes an image several times, with other draws: it needs random augmentation, hflip for example")
        return self

    @property
    def redraws(self) -> bool:
        """Whether the transform draws anew for each image, mixup and CutMix apart."""
        drawn = self.hflip, self.vflip, self.color_jitter, self.grayscale, self.blur, self.auto_augment, self.erase
        return self.crop not in ("none", "squash") or any(drawn)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, by mixup or CutMix."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)


class DataSpec(Table):
    """`[data]`: the data set and how its images are loaded."""

    name: str = Field(
        default="digits",
        description="digits (embedded), cifar10, cifar100, mnist, fashion_mnist, kmnist, stl10, svhn, imagenette, imagenet, "
        '"folder" (one folder of images per class), "webdataset" (tar shards), or "arrow" (Hugging Face\'s save_to_disk)',
    )
    root: str | None = Field(default=None, description="folder of the images; digits needs none")
    train_split: str = Field(default="train", description="the split that is trained on")
    eval_split: str = Field(default="validation", description="the split that is evaluated on")
    train_limit: Positive | None = Field(default=None, description="use only so many training images (a fixed, stratified draw)")
    eval_limit: Positive | None = Field(default=None, description="use only so many evaluation images")
    mean: Means | None = Field(default=None, description="per channel; default: the data set's or the backbone's")
    std: Deviations | None = Field(default=None, description="per channel")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = Field(default="bilinear", description="of resized images")
    crop_pct: Annotated[float, Field(ge=0.05, le=1)] = Field(default=1.0, description="fraction of the resized image that evaluation uses")
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(default=0, description="loader processes; 0 loads in the training process")
    cache: Size = Field(
        default=2**30,
        description="memory of each process for images that are the same in every epoch (of evaluation, and of training without random "
        "augmentation): decoded once if all of them fit; 0 decodes them each time",
    )
    decode: Literal["whole", "draft"] = Field(
        default="whole",
        description="draft: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves as many pixels as it is resized to; faster "
        "for large photos, pixels differ a little",
    )
    augment: AugmentSpec = Field(default=AugmentSpec(), description="augmentation of training images; none by default")
