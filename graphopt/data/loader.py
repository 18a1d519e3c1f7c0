"""From images to batches. The order of samples and their augmentation are functions of (seed, epoch, sample).

So a run that is resumed within an epoch gets the same batches as an uninterrupted one, with any number of loader processes.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from graphopt.data.datasets import Split, open_split
from graphopt.data.memory import Memory
from graphopt.data.randomness import mixed_seed, preserved, reseed
from graphopt.data.transforms import LowFrequency, Step, Transform, eval_transform, rgb, train_transform
from graphopt.data.workers import begin, end, ignore_stop
from graphopt.errors import RunError, first_line
from graphopt.spec import DataSpec

Key = tuple[int, ...]  # epoch, index of the sample; of one that the epoch takes again, how often it has taken it before


@dataclass(frozen=True)
class Rank:
    """One process among those that train together: its number and their count."""

    number: int = 0
    count: int = 1


SINGLE = Rank()


class Batch(NamedTuple):
    """What one forward takes."""

    sample: Tensor  # (N,) int64, numbers of the samples
    input: Any  # (N, ...) float32; what arrives from another process, for one that continues its computation
    target: Tensor  # (N,) int64 classes, or (N, classes) float32 after mixup


class Feed(Protocol):
    """A source of training batches: images, or cached features of a prefix that has left the graph."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches, `len(feed)` of them, from number `start` on; a function of (seed, epoch) alone."""


class Unreadable(NamedTuple):
    """An image that could not be opened, and why. Loader processes return it for a batch: an exception would arrive as a traceback."""

    image: str
    why: str

    def error(self) -> RunError:
        return RunError(f"the image cannot be read ({self.why})", where=self.image, fix="Replace the file, or take it out of the data set")


class Samples(Dataset[tuple[int, Tensor, int]]):
    """`samples[(epoch, i)]` is `(i, image (C, H, W) float32, class)`; if `deterministic`, the same in every epoch.

    Args:
        transform: of this package, or any other from an RGB image to a tensor.
        repeats: how often an epoch takes a sample in a row, on neighbouring ranks; it is as long as with 1, and takes that part of the
            samples (Hoffer et al., arXiv 1901.09335).
        mirrors: dimensions of the image along which numbers of views flip it: the first one for every odd number, and so on by bits.
        kept: whether an `ImageFeed` keeps their pixels in memory; for deterministic ones with a transform of this package.
    """

    def __init__(
        self, split: Split, limit: int | None, transform: Step, *, deterministic: bool, seed: int, kept: bool = False, repeats: int = 1
    ) -> None:
        self.images, self.chosen = split.images, stratified(split.targets, limit)
        self.fingerprint, self.outline = partial(split.fingerprint, self.chosen), partial(split.outline, self.chosen)
        self.transform: Any = transform
        self.deterministic, self.seed, self.kept, self.repeats = deterministic, seed, kept, repeats
        self.mirrors: tuple[int, ...] = ()

    def prepared(self, transform: Step, *, deterministic: bool, mirrors: tuple[int, ...] = ()) -> "Samples":
        """The same samples, prepared by another transform."""
        other = copy.copy(self)
        other.transform, other.deterministic, other.mirrors, other.kept = transform, deterministic, mirrors, False
        return other

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Key) -> tuple[int, Tensor, int]:
        sample = self.__getitems__([key])[0]
        if isinstance(sample, Unreadable):
            raise sample.error()
        return sample

    def __getitems__(self, keys: list[Key]) -> list[tuple[int, Tensor, int] | Unreadable]:
        """A batch, as the loader asks for it."""
        of = self.transform
        return self.read(keys, of.decode, of.tensor) if isinstance(of, Transform) else self.read(keys, rgb, of)

    def read(self, keys: list[Key], decode: Step, convert: Step) -> list[tuple[int, Tensor, int] | Unreadable]:
        """Samples whose images are decoded and converted so. Generators are restored once for all of them: that is most of the cost."""
        with nullcontext() if self.deterministic else preserved():
            return [self._sample(key, decode, convert) for key in keys]

    def _sample(self, key: Key, decode: Step, convert: Step) -> tuple[int, Tensor, int] | Unreadable:
        index = key[1]
        number = self.chosen[index]
        if not self.deterministic:
            reseed(self.seed, *key)
        try:
            image, target = self.images[number]
            image = decode(image)  # some files are only opened before
        except Exception as error:  # Pillow raises anything, by format
            return Unreadable(self._name(number), first_line(error))
        mirrored = [dim for bit, dim in enumerate(self.mirrors) if key[0] >> bit & 1]
        return index, convert(image).flip(mirrored) if mirrored else convert(image), int(target)

    def _name(self, number: int) -> str:
        if hasattr(self.images, "name"):
            return str(self.images.name(number))
        return str(self.images.samples[number][0]) if hasattr(self.images, "samples") else f"image {number}"


class _Pixels(Dataset[Any]):
    """The pixels of samples, (C, H, W) uint8, before they are normalised."""

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __getitems__(self, keys: list[Key]) -> list[tuple[int, Tensor, int] | Unreadable]:
        return self.samples.read(keys, self.transform.decode, self.transform.pixels)


@dataclass(frozen=True)
class Data:
    """An opened data set, made for one input shape."""

    train: Samples
    evaluation: Samples
    classes: int


def check_image(input: tuple[int, ...]) -> None:
    """Raises RunError for a sample's shape that no image has."""
    if len(input) != 3 or input[0] not in (1, 3):
        raise RunError(f"images are (1, H, W) or (3, H, W), the backbone takes {tuple(input)}", where="backbone.input")


def open_data(spec: DataSpec, input: tuple[int, ...], seed: int) -> Data:
    """The samples that a spec asks for, as tensors of shape `input`. Raises RunError for an input that no image has, and bad files."""
    check_image(input)
    train, evaluation = (open_split(spec.name, spec.root, split) for split in (spec.train_split, spec.eval_split))
    if list(train.classes) != list(evaluation.classes):
        what = f"{spec.train_split} has {len(train.classes)} classes, {spec.eval_split} has {len(evaluation.classes)}"
        pairs = ((spec.train_split, train, evaluation), (spec.eval_split, evaluation, train))
        only = [f"only {split} has {', '.join(extra[:5])}" for split, a, b in pairs if (extra := sorted({*a.classes} - {*b.classes}))]
        raise RunError("; ".join([what, *only]), where="data", fix="Give both the same folders")
    options: dict[str, Any] = {"deterministic": not spec.augment.redraws, "seed": seed}
    data = Data(
        Samples(train, spec.train_limit, train_transform(spec, input), **options, repeats=spec.augment.repeats),
        Samples(evaluation, spec.eval_limit, eval_transform(spec, input), deterministic=True, seed=seed),
        len(train.classes),
    )
    _keep(data, spec.cache, math.prod(input))
    return data


def prepared(data: Data, spec: DataSpec, input: tuple[int, ...], low_frequency: tuple[int, int] | None = None) -> Data:
    """The samples of an opened data set, prepared for a spec with another augmentation, as tensors of shape `input`.

    With `low_frequency`, of their spectrum only so many frequencies are kept, and they have that size. Raises RunError as `open_data`.
    """
    transforms = train_transform(spec, input), eval_transform(spec, input)
    if low_frequency is not None:
        for transform in transforms:
            transform.then(LowFrequency(*low_frequency))
    train = data.train.prepared(transforms[0], deterministic=not spec.augment.redraws)
    found = Data(train, data.evaluation.prepared(transforms[1], deterministic=True), data.classes)
    _keep(found, 0 if low_frequency else spec.cache, math.prod(input))
    return found


def _keep(data: Data, left: int, size: int) -> None:
    """Lets feeds keep the pixels of samples that are the same in every epoch, `size` bytes each, as far as they fit."""
    for samples in (data.evaluation, data.train):
        if samples.deterministic and len(samples) * size <= left:
            samples.kept, left = True, left - len(samples) * size


def stratified(targets: Any, limit: int | None) -> list[int]:
    """Indices of `limit` samples, classes in proportion, always the same ones; all of them for None."""
    labels = np.asarray(targets)
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # Sample r of a class of n gets rank (r + 1/2) / n; the lowest ranks hold the same share of each class.
        rank[np.random.RandomState(0).permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return sorted(np.lexsort((np.arange(len(labels)), labels, rank))[:limit].tolist())


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits its samples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch))).tolist()


@dataclass(frozen=True)
class _Collate:
    """Makes a batch of samples; all their pixels are normalised together, which copies less."""

    normalized: Callable[[Tensor], Tensor] | None = None

    def __call__(self, samples: list[Any]) -> Any:
        unreadable = next((s for s in samples if isinstance(s, Unreadable)), None)
        if unreadable is not None:
            return unreadable
        numbers, images, targets = default_collate(samples)
        return numbers, images if self.normalized is None else self.normalized(images), targets


def _loader(
    samples: Samples, order: Iterable[list[Key]], workers: int, seed: int, *, kept: bool = False, **options: Any
) -> DataLoader[Any]:
    """A loader of batches with these keys; for `kept`, of pixels that are not normalised yet."""
    transform, source, collate = samples.transform, cast(Any, samples), _Collate()
    if isinstance(transform, Transform) and transform.erase is None:
        source, collate = _Pixels(samples, transform), _Collate(None if kept else transform.normalized)
    return DataLoader(
        source,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_stop,
        # Its own generator: by default the loader draws from the global one, which belongs to the model.
        generator=torch.Generator().manual_seed(mixed_seed(seed)),
        **options,
    )


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    for loaded in batches:
        if isinstance(loaded, Unreadable):
            raise loaded.error()
        yield Batch(*loaded)


def load(samples: Samples, keys: Iterable[Sequence[Key]], workers: int = 0) -> Iterator[Batch]:
    """The batches with these keys."""
    iterator = begin(_loader(samples, map(list, keys), workers, seed=0))
    try:
        yield from _checked(iterator)
    finally:
        end(iterator)


@dataclass
class _Order:
    """The keys of this rank's batches, for the loader; apart from the feed, which so is in no cycle of references."""

    count: int
    seed: int
    shuffle: bool
    batch: int
    batches: int
    rank: Rank
    repeats: int
    wanted: Callable[[], Iterator[list[Key]]] = lambda: iter(())  # what the loader loads next

    def __iter__(self) -> Iterator[list[Key]]:
        return self.wanted()

    def keys(self, epoch: int, start: int) -> Iterator[list[Key]]:
        """Those of an epoch, from its batch number `start` on."""
        order = epoch_order(self.count, self.seed, epoch) if self.shuffle else list(range(self.count))
        taken: list[Key] = [(epoch, index, again)[: 3 if again else 2] for index in order for again in range(self.repeats)]
        mine = taken[self.rank.number : self.count : self.rank.count]
        for number in range(start, self.batches):
            yield mine[number * self.batch : (number + 1) * self.batch] or taken[:1]


class ImageFeed:
    """This rank's batches of images: shuffled, in whole steps, for training; without `shuffle`, every sample once in order.

    A training step takes `step` consecutive samples of the epoch's order: on all ranks together, in `accumulate` batches on each. Which
    samples a step takes depends on neither number. Without `shuffle`, all ranks have as many batches; one without samples left repeats
    sample 0, and `real` says so.

    Samples that are `kept` are decoded once, in the first epoch that has them; their pixels stay in this process.

    Args:
        step: samples per optimizer step; ranks times `accumulate` divides it.
    """

    def __init__(
        self,
        samples: Samples,
        step: int,
        *,
        seed: int = 0,
        accumulate: int = 1,
        shuffle: bool = True,
        workers: int = 0,
        pin: bool = False,
        rank: Rank = SINGLE,
    ) -> None:
        self.samples, self.step, self.seed = samples, step, seed
        self.batch = step // (accumulate * rank.count)
        self.workers, self.pin, self.rank = workers, pin, rank
        count = len(samples)
        self._batches = count // step * accumulate if shuffle else -(-count // (self.batch * rank.count))
        if shuffle and not self._batches:
            raise RunError(f"one training step takes {step} images, the training set has {count}", where="train.batch")
        self._order = _Order(count, seed, shuffle, self.batch, self._batches, rank, samples.repeats if shuffle else 1)
        self._iterator: Any = None
        kept = samples.kept and isinstance(samples.transform, Transform)
        self._memory = Memory(count, samples.transform.normalized) if kept else None
        options = {"persistent_workers": workers > 0, "pin_memory": pin and not kept}
        self._loader = _loader(samples, self._order, workers, seed, kept=kept, **options)

    def __len__(self) -> int:
        return self._batches

    def real(self, number: int) -> int:
        """How many samples of this rank's batch count."""
        mine = -(-(len(self.samples) - self.rank.number) // self.rank.count)
        return max(0, min(self.batch, mine - number * self.batch))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `start` on; loader processes begin at once."""
        if self._memory is not None:
            return self._remembered(self._memory, list(self._order.keys(epoch, start)))
        self._order.wanted = partial(self._order.keys, epoch, start)
        self._iterator = begin(self._loader)
        return _checked(self._iterator)

    def _remembered(self, memory: Memory, keys: list[list[Key]]) -> Iterator[Batch]:
        """The batches with these keys; what the memory has is not loaded again."""
        missing = [[key for key in batch if key[1] not in memory] for batch in keys]
        wanted = [batch for batch in missing if batch]
        if wanted:
            self._order.wanted = lambda: iter(wanted)
            self._iterator = begin(self._loader)
        loaded = _checked(self._iterator if wanted else ())

        def batches() -> Iterator[Batch]:
            for batch, lacking in zip(keys, missing, strict=True):
                if lacking:
                    memory.put(*next(loaded))
                found = Batch(*memory.take([key[1] for key in batch]))
                yield Batch(*(tensor.pin_memory() for tensor in found)) if self.pin else found

        return batches()

    def remembered(self, epoch: int) -> Iterator[Batch]:
        """Those of the epoch's batches whose samples are all kept already; nothing is loaded. None where this feed keeps no samples."""
        if self._memory is not None:
            for batch in self._order.keys(epoch, 0):
                numbers = [index for _, index in batch]
                if all(number in self._memory for number in numbers):
                    yield Batch(*self._memory.take(numbers))

    def close(self) -> None:
        """Ends the loader processes."""
        end(self._iterator)
        self._iterator = None
