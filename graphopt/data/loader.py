"""Images to batches: timm's transforms, and an order and augmentation that are functions of (seed, epoch, sample).

So a run resumed in the middle of an epoch sees the very batches it would have seen, with any number of loader processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from graphopt.data.datasets import Images, Split, open_split, source
from graphopt.errors import RunError
from graphopt.spec import AugmentSpec, DataSpec
from graphopt.train.stopping import ignore_in_worker

Key = tuple[int, int]


class Batch(NamedTuple):
    """What one forward takes: `sample` (N,) int64 numbers of the samples, `input` (N, ...) float32, `target` (N,) int64 classes
    (or (N, classes) float32 where mixup made them soft)."""

    sample: Tensor
    input: Tensor
    target: Tensor


class Feed(Protocol):
    """Where a phase's training batches come from: images, or features kept from a prefix that has left the graph."""

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `start` on; a function of (seed, epoch) alone."""
        ...


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; near ones give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside from the CPU generators, outside nothing has happened."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reseed(*parts: int) -> None:
    """From here on every CPU generator that an augmentation may draw from is a function of `parts`."""
    seed = mixed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class Unreadable(NamedTuple):
    """An image that could not be opened: which, and why. Loader processes hand it on as a batch: an exception would come as a traceback."""

    image: str
    why: str

    def error(self) -> RunError:
        fix = "Replace the file, or take it out of the data set"
        return RunError(f"the image cannot be read ({self.why})", where=self.image, fix=fix)


class Samples(Dataset[tuple[int, Tensor, int]]):
    """`samples[(epoch, i)]` is `(i, image (C, H, W) float32, class)`.

    Attributes:
        deterministic: whether sample i is the same in every epoch (what a feature cache may rely on).
    """

    def __init__(
        self,
        split: Split,
        chosen: list[int],
        transform: Callable[[Any], Tensor],
        *,
        deterministic: bool,
        seed: int,
    ) -> None:
        self.images: Images = split.images
        self.chosen, self.transform = chosen, transform
        self.deterministic, self.seed = deterministic, seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Key) -> tuple[int, Tensor, int]:
        found = self.__getitems__([key])[0]
        if isinstance(found, Unreadable):
            raise found.error()
        return found

    def __getitems__(self, keys: list[Key]) -> list[tuple[int, Tensor, int] | Unreadable]:
        """The loader's way to ask for a batch: generators are put back once for all its samples, which is most of the cost."""
        with nullcontext() if self.deterministic else preserved():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> tuple[int, Tensor, int] | Unreadable:
        number = self.chosen[index]
        try:
            image, target = self.images[number]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, by format
            files = getattr(self.images, "samples", None)
            return Unreadable(str(files[number][0]) if files else f"image {number}", (str(error) or type(error).__name__).splitlines()[0])
        if not self.deterministic:
            reseed(self.seed, epoch, index)
        return index, self.transform(image), int(target)


@dataclass(frozen=True)
class Data:
    """An opened data set, made for one input shape."""

    train: Samples
    evaluation: Samples
    classes: int


def open_data(spec: DataSpec, input: tuple[int, ...], seed: int) -> Data:
    """The training and evaluation samples that a spec asks for, as tensors of shape `input`.

    Raises RunError: an input that images cannot have, files missing, splits whose classes differ.
    """
    if len(input) != 3 or input[0] not in (1, 3):
        raise RunError(f"images are (1, H, W) or (3, H, W), the backbone takes {tuple(input)}", where="backbone.input")
    train = open_split(spec.name, spec.root, spec.train_split)
    evaluation = open_split(spec.name, spec.root, spec.eval_split)
    if train.classes != evaluation.classes:
        raise RunError(f"{spec.train_split} has {train.classes} classes, {spec.eval_split} has {evaluation.classes}", where="data")
    return Data(
        Samples(
            train,
            stratified(train.targets, spec.train_limit),
            train_transform(spec, input),
            deterministic=not _random_transform(spec.augment),
            seed=seed,
        ),
        Samples(
            evaluation,
            stratified(evaluation.targets, spec.eval_limit),
            eval_transform(spec, input),
            deterministic=True,
            seed=seed,
        ),
        train.classes,
    )


def stratified(targets: Any, limit: int | None) -> list[int]:
    """Indices of `limit` samples, classes in proportion, always the same ones; all of them for None."""
    labels = np.asarray(targets)
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        # Sample r of a class of n stands at (r + 1/2) / n; taking the lowest places takes the same share of each class.
        place[np.random.RandomState(0).permutation(where)] = (np.arange(len(where)) + 0.5) / len(where)
    return sorted(np.lexsort((np.arange(len(labels)), labels, place))[:limit].tolist())


def _random_transform(augment: AugmentSpec) -> bool:
    quiet = augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    return quiet.random


def statistics(spec: DataSpec, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the spec's, else the data set's. Raises RunError for a wrong count."""
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


def eval_transform(spec: DataSpec, input: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """PIL image -> (C, H, W): resized so that `crop_pct` of it is kept, centre crop, normalised."""
    mean, std = statistics(spec, input[0])
    return transforms.Compose([*_geometry(spec, input), *_colors(input[0]), transforms.ToTensor(), transforms.Normalize(mean, std)])


def train_transform(spec: DataSpec, input: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """PIL image -> (C, H, W) with the spec's augmentation by timm; without any, exactly what evaluation sees."""
    augment = spec.augment
    if not _random_transform(augment):
        return eval_transform(spec, input)
    mean, std = statistics(spec, input[0])
    try:
        first, second, last = create_transform(
            input,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=spec.interpolation,
            mean=mean,
            std=std,
            re_prob=augment.erase,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise RunError(f"timm refused the augmentation: {error}", where="data.augment") from error
    steps = list(first.transforms)
    if augment.crop != "resized":
        # timm's first step is its random resized crop; flips follow it.
        padded = [transforms.RandomCrop(input[1:], padding=max(input[1:]) // 8)] if augment.crop == "pad" else []
        steps[:1] = [*_geometry(spec, input), *padded]
    _repair(second)
    # Colours are augmented in colour, whatever the network takes: timm's policies know no other images.
    return transforms.Compose([_rgb, *steps, second, *_colors(input[0])[1:], last])


def _repair(transform: Any) -> None:
    """timm's policies may ask posterize for 0 bits, which Pillow refuses since version 12; one is the least that shows anything."""
    fields = ("transforms", "ops", "policy")
    parts = transform if isinstance(transform, list) else [part for name in fields for part in getattr(transform, name, [])]
    for part in parts:
        if getattr(part, "aug_fn", None) is auto_augment.posterize:
            part.aug_fn = _posterize
        _repair(part)


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    return auto_augment.posterize(image, max(1, bits))


def _geometry(spec: DataSpec, input: tuple[int, ...]) -> list[Any]:
    made = create_transform(input, is_training=False, interpolation=spec.interpolation, crop_pct=spec.crop_pct)
    return [step for step in made.transforms if isinstance(step, (transforms.Resize, transforms.CenterCrop)) or _resizes(step)]


def _resizes(step: Any) -> bool:
    return type(step).__module__.startswith("timm.") and "Tensor" not in type(step).__name__


def _rgb(image: Any) -> Any:
    return image.convert("RGB")


def _grey(image: Any) -> Any:
    return image.convert("L")


def _colors(channels: int) -> list[Any]:
    return [_rgb] if channels == 3 else [_rgb, _grey]


class _Order:
    """Batches of sample keys; a function of (seed, epoch), cut between ranks."""

    def __init__(self, count: int, batch: int, batches: int, seed: int, shuffle: bool, rank: int, world: int) -> None:
        self.count, self.batch, self.batches, self.seed, self.shuffle = count, batch, batches, seed, shuffle
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self.count, self.seed, self.epoch) if self.shuffle else list(range(self.count))
        mine = order[self.rank :: self.world]
        for number in range(self.start, self.batches):
            yield [(self.epoch, index) for index in mine[number * self.batch : (number + 1) * self.batch]]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits its samples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()


def _collate(samples: list[Any]) -> Any:
    unread = next((s for s in samples if isinstance(s, Unreadable)), None)
    return unread or default_collate(samples)


class ImageFeed:
    """Training batches of images in shuffled order (or, with `shuffle` off, every sample once in its own order)."""

    def __init__(
        self,
        samples: Samples,
        batch: int,
        *,
        seed: int = 0,
        accumulate: int = 1,
        shuffle: bool = True,
        workers: int = 0,
        pin: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        count = len(samples)
        if shuffle:
            batches = count // (batch * accumulate * world) * accumulate
            if batches == 0:
                raise RunError(
                    f"one training step takes {batch * accumulate * world} images, the training set has {count}",
                    where="train.batch",
                )
        else:
            batches = -(-count // (batch * world))
        self._order = _Order(count, batch, batches, seed, shuffle, rank, world)
        self._loader = DataLoader(
            samples,
            batch_sampler=self._order,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_in_worker,
            pin_memory=pin,
            # Its own generator: the loader otherwise draws from the global one, which belongs to the model.
            generator=torch.Generator().manual_seed(mixed_seed(seed)),
        )

    def __len__(self) -> int:
        return self._order.batches

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Feed.batches`."""
        self._order.epoch, self._order.start = epoch, start
        for loaded in self._loader:
            if isinstance(loaded, Unreadable):
                raise loaded.error()
            yield Batch(*loaded)


class Mixer:
    """timm's mixup and CutMix, drawn from (seed, epoch, batch number) rather than from whatever came before."""

    def __init__(self, augment: AugmentSpec, classes: int, smoothing: float, seed: int) -> None:
        self._mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=smoothing, num_classes=classes)
        self._seed = seed

    @classmethod
    def of(cls, augment: AugmentSpec, classes: int, smoothing: float, seed: int) -> Mixer | None:
        """None where the spec asks for neither."""
        return cls(augment, classes, smoothing, seed) if augment.mixup or augment.cutmix else None

    def __call__(self, batch: Batch, epoch: int, number: int) -> Batch:
        """The batch, mixed, with soft targets (N, classes). Raises RunError for an odd batch, which timm cannot pair."""
        if len(batch.input) % 2:
            raise RunError(f"mixup pairs images, the batch has {len(batch.input)}", where="train.batch")
        with preserved():
            reseed(self._seed, epoch, number, 1)
            mixed, target = self._mixup(batch.input.clone(), batch.target)
        return Batch(batch.sample, mixed, target)
