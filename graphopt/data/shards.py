"""Images in tar shards, as webdataset writes them: of one key, an image and a `.cls` member with the number of its class.

Shards are read by random access, so that the order of samples is that of every other data set: a function of seed and epoch, exact after
a resume in the middle of an epoch, and each process reads its own samples only. The index of a shard, where its members lie, is made once
and kept in the user's cache folder.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from graphopt.errors import RunError, first_line, listed
from graphopt.files import cache_folder, read_text, sealed, unsealed, write_atomically

#: changes with what an index holds
FORMAT_VERSION = 2
_BLOCK = 512  # bytes, of which tar files are made

Sample = tuple[str, int, int, int]  # image member, its first byte in the file, bytes, class


@dataclass(frozen=True)
class TarImages:
    """`images[i]` is a PIL image and its class."""

    shards: Sequence[Path]
    members: Sequence[tuple[int, Sample]]  # number of the shard, and what it holds there

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        shard, (_, offset, size, label) = self.members[number]
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("the shard has been cut short")
        return Image.open(io.BytesIO(content)), label

    def name(self, number: int) -> str:
        """Where an image is, for messages."""
        shard, (member, *_) = self.members[number]
        return f"{self.shards[shard]}, {member}"

    def fingerprint(self) -> bytes:
        """Changes with the name, the size or the time of a shard."""
        return json.dumps([_stamp(shard) for shard in self.shards]).encode()


def open_shards(root: Path, names: Sequence[str]) -> tuple[TarImages, list[int], list[str]]:
    """The images of a split, their classes, and the names of all classes, which are numbers.

    The shards of a split are the tar files in a folder with its name (one of `names`), or those that have it in their own name
    (`imagenet-train-000000.tar`). Raises FileNotFoundError if there are none, RunError for a gap in their numbers, a damaged one, a key
    that is there twice, and a sample without image or class.
    """
    everywhere = sorted(root.rglob("*.tar"))
    parts = {shard: {*shard.relative_to(root).parts[:-1], *re.split(r"[-_.]", shard.stem)} for shard in everywhere}
    shards = [shard for shard in everywhere if parts[shard] & {*names}]
    if not shards:
        raise FileNotFoundError(f"no tar file of {' or '.join(names)}")
    _check_numbers(shards)
    # A class may be in one split only: all shards say how many there are.
    found = {shard: _index(shard) for shard in everywhere}
    keys: dict[str, Path] = {}
    for shard in shards:
        for member, *_ in found[shard]:
            key = _split(member)[0]
            if (first := keys.setdefault(key, shard)) != shard:
                raise RunError(f"key {key!r} is in {first.name} already", where=f"{shard}, {member}", fix="Each key may be there once")
    members = [(number, sample) for number, shard in enumerate(shards) for sample in found[shard]]
    classes = 1 + max((label for samples in found.values() for *_, label in samples), default=-1)
    return TarImages(shards, members), [sample[3] for _, sample in members], [str(label) for label in range(classes)]


def _check_numbers(shards: Iterable[Path]) -> None:
    """Raises RunError unless the shards of one name are numbered without a gap."""
    numbers: dict[tuple[Path, str, int], list[int]] = {}
    for shard in shards:
        if match := re.fullmatch(r"(.*?)(\d+)", shard.stem):
            numbers.setdefault((shard.parent, match[1], len(match[2])), []).append(int(match[2]))
    for (folder, prefix, digits), found in numbers.items():
        if missing := sorted({*range(min(found), max(found))} - {*found}):
            what = f"shards are missing: {listed(f'{prefix}{number:0{digits}}.tar' for number in missing)}"
            raise RunError(what, where=str(folder), fix="Copy them again: their numbers have to follow each other")


def _index(shard: Path) -> list[Sample]:
    """What a shard holds; from the cache if it has not changed since it was indexed."""
    # The last time is of any change, also by a tool that gives a file the size and the time of another.
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, *_stamp(shard), shard.stat().st_ctime_ns]).encode()).hexdigest()[:32]
    cache = None
    with suppress(OSError, ValueError, KeyError, RuntimeError):  # there is no home, no index yet, or a damaged one
        cache = cache_folder("shards") / f"{key}.json"
        return [(member, offset, size, label) for member, offset, size, label in unsealed(read_text(cache))["samples"]]
    samples = _scan(shard)
    with suppress(OSError, RunError):  # a cache that cannot be written costs time only
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, sealed({"samples": samples}))
    return samples


def _stamp(shard: Path) -> tuple[str, int, int]:
    status = shard.stat()
    return str(shard.absolute()), status.st_size, status.st_mtime_ns


def _scan(shard: Path) -> list[Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    member = ""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for found in tar:
                member = found.name
                key, kind = _split(member)
                if not found.isfile() or not (kind == "cls" or f".{kind}" in IMG_EXTENSIONS):
                    continue
                if key in (labels if kind == "cls" else images):
                    raise _wrong(shard, member, "has a key that the shard has had before")
                if kind == "cls":
                    labels[key] = _label(tar, found, shard)
                else:
                    images[key] = found
            # The reader takes a damaged header for the end.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("it has no end mark where its members end")
    except (tarfile.TarError, EOFError, OSError) as error:
        after = f" after {member}" if member else ""
        fix = "Copy it again; shards are plain tar files, not compressed"
        raise RunError(f"the shard is damaged{after}: {first_line(error)}", where=str(shard), fix=fix) from error
    if alone := sorted(labels.keys() ^ images.keys()):
        raise _wrong(shard, alone[0], "has no class" if alone[0] in images else "has no image")
    return [(found.name, found.offset_data, found.size, labels[key]) for key, found in images.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(100).decode(errors="replace").strip() if file is not None else ""
    if not re.fullmatch(r"\d{1,9}", text):
        raise _wrong(shard, member.name, f"is {text[:20]!r}, not the number of a class")
    return int(text)


def _split(member: str) -> tuple[str, str]:
    """The key of a member and what it is: the file's name up to its first dot, and the rest, as webdataset has it."""
    folder, _, name = member.rpartition("/")
    key, _, kind = name.partition(".")
    return f"{folder}/{key}" if folder else key, kind.lower()


def _wrong(shard: Path, member: str, what: str) -> RunError:
    return RunError(what, where=f"{shard}, {member}", fix="Each key has one image and one .cls member with the number of its class, from 0")
