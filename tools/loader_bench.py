"""The loader against timm's own on a folder of JPEGs: images per second of processor time, in turns in one process.

    python tools/loader_bench.py [--images 128] [--rounds 9] [--out tools/tables/loader.md]

All without loader processes, on one thread, with random resized crops of 224 pixels and flips, in batches of 32. The JPEGs are made here:
noise of several scales, at quality 90 as large as photographs of that size are. A ratio is that of one round's rates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import heading
from PIL import Image
from timm.data import create_dataset, create_loader  # type: ignore[attr-defined]  # re-exported without saying so

from graphopt.data.loader import ImageFeed, open_data
from graphopt.spec import AugmentSpec, DataSpec

SHAPE, BATCH = (3, 224, 224), 32


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Noise of several scales, the coarser the stronger, as in photographs."""
    random = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for scale in (4, 16, 64, 256):
        noise = random.randint(0, 256, (height // scale + 2, width // scale + 2, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) * scale**0.5
    total += random.normal(0, 40, total.shape)
    low, high = np.percentile(total, (1, 99))
    return Image.fromarray(np.clip((total - low) * (255 / (high - low)), 0, 255).astype(np.uint8))


def folder(root: Path, images: int, width: int, height: int) -> int:
    """Writes a data set of two classes; returns the mean size of a file in bytes."""
    sizes = []
    for split, count in (("train", images), ("validation", 2)):
        for number in range(count):
            file = root / split / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(width, height, number).save(file, quality=90)
            sizes.append(file.stat().st_size)
    return round(statistics.mean(sizes))


def ours(root: Path, augment: AugmentSpec, **changes: Any) -> Callable[[int], Iterable[Any]]:
    spec = DataSpec(name="folder", root=str(root), augment=augment, **changes)
    feed = ImageFeed(open_data(spec, SHAPE, seed=0).train, BATCH)
    return feed.batches


def timms(root: Path, **changes: Any) -> Callable[[int], Iterable[Any]]:
    """The loader that the `train.py` of timm makes, on a CPU."""
    data = create_dataset("", root=str(root), split="train", is_training=True)
    options = {"interpolation": "bilinear", "hflip": 0.5, "color_jitter": 0.0, "num_workers": 0, "device": torch.device("cpu"), **changes}
    loader = create_loader(data, SHAPE, BATCH, is_training=True, persistent_workers=False, **options)
    return lambda _: loader


def variants(root: Path) -> dict[str, Callable[[int], Iterable[Any]]]:
    crop = AugmentSpec(crop="resized", hflip=0.5)
    kept = ours(root, AugmentSpec())
    list(kept(0))
    return {
        "timm's loader": timms(root, use_prefetcher=False),
        "timm's loader, its prefetcher": timms(root, use_prefetcher=True),
        "graphopt": ours(root, crop),
        'graphopt, decode = "draft"': ours(root, crop, decode="draft"),
        "graphopt, no augmentation, cache = 0": ours(root, AugmentSpec(), cache=0),
        "graphopt, no augmentation, from the second epoch on": kept,
    }


def measured(feeds: Mapping[str, Callable[[int], Iterable[Any]]], images: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of processor time, by round; the first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in feeds}
    for number in range(rounds + 1):
        for name, batches in feeds.items():
            began = time.process_time()
            for _ in batches(number):
                pass
            rates[name].append(images / (time.process_time() - began))
    return {name: found[1:] for name, found in rates.items()}


def ratio(images: int = 64, rounds: int = 5) -> float:
    """Images per second, graphopt's over timm's: the median over rounds."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder(root, images, 500, 375)
        chosen = {key: feed for key, feed in variants(root).items() if key in ("timm's loader", "graphopt")}
        rates = measured(chosen, images, rounds)
    return statistics.median(o / t for o, t in zip(rates["graphopt"], rates["timm's loader"], strict=True))


def table(sizes: Iterable[tuple[int, int]], images: int, rounds: int) -> Iterable[str]:
    for width, height in sizes:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            size = folder(root, images, width, height)
            rates = measured(variants(root), images, rounds)
        yield f"\n{images} JPEGs of {width}x{height}, {size / 1024:.0f} KiB on average:\n"
        yield "| | images/s: quartiles | times timm's: quartiles |"
        yield "|---|---|---|"
        base = rates["timm's loader"]
        for label, found in rates.items():
            ratios = [own / other for own, other in zip(found, base, strict=True)]
            yield f"| {label} | {_quartiles(found, 0)} | {_quartiles(ratios, 2)} |"


def _quartiles(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in statistics.quantiles(values, n=4, method="inclusive"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(table([(500, 375), (2000, 1500)], options.images // BATCH * BATCH, options.rounds))
    text = "\n".join([heading("The loader against timm's", __doc__), *lines, ""])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
