"""Flips bits of files that graphopt reads and cuts them short: each time there is an error, or what is read is the same."""

from __future__ import annotations

import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import small_run
import torch
from parts_run import PartsRun
from PIL import Image

import graphopt
from graphopt.data.loader import open_data
from graphopt.diff.render.run import read_run
from graphopt.errors import GraphoptError
from graphopt.hashing import content_digest
from graphopt.models.weights import read_weights
from graphopt.plan_file import read_plan_file
from graphopt.spec import DataSpec, load
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.feature_cache.store import CacheDirectory, CacheEntry, EntryLayout
from graphopt.train.ledger import LedgerFile, check_ledger
from graphopt.train.parts import FOLDER, folder_of

OUTCOMES = ("refused with the file's name", "computed again", "harmless", "other data", "silent", "unclear")


@dataclass
class Target:
    """A file, and what of it is used: `read` returns that, or None where it is computed again.

    With `proof` the format, or graphopt, has a digest of what is read. Without, other pixels and labels are all that damage may cause.
    """

    path: Path
    read: Callable[[], Any]
    proof: bool = True
    kind: str | None = None  # what it is called in the table, where its name does not say
    content: bytes = field(init=False)
    expected: Any = field(init=False)

    def __post_init__(self) -> None:
        self.content, self.expected = self.path.read_bytes(), self.read()

    def outcome(self, draw: random.Random) -> tuple[str, str]:
        """Damages the file, reads it and mends it; what came of it, and the case in words."""
        damaged = bytearray(self.content)
        at = draw.randrange(len(damaged))
        if draw.random() < 0.2:
            del damaged[at:]
            case = f"{self.path.name}, cut after {at} bytes"
        else:
            bit = draw.randrange(8)
            damaged[at] ^= 1 << bit
            case = f"{self.path.name}, bit {bit} of byte {at}"
        self.path.write_bytes(damaged)
        try:
            found = self.read()
        except GraphoptError as error:
            return (OUTCOMES[0] if self.path.name in str(error) else "unclear"), f"{case}: {error}"
        except Exception as error:
            return "unclear", f"{case}: {type(error).__name__}: {error}"
        finally:
            self.path.write_bytes(self.content)
        same, other = found == self.expected, "silent" if self.proof else "other data"
        return ("computed again" if found is None else "harmless" if same else other), case


def targets(folder: Path) -> list[Target]:
    """The files of a finished run, what it exports, and cached features."""
    run = small_run.SmallRun()
    run.train(folder / "run")
    found = [Target(path, partial(_digest, load_checkpoint, path)) for path in sorted((folder / "run").glob("*.pt"))]
    table = folder / "run"

    def read() -> Any:
        seen = read_run(table)
        return seen, load(table).resolved()

    found += [Target(table / name, read) for name in ("metrics.jsonl", "summary.json", "spec.toml", "run.json")]
    found.append(Target(table / "ledger.bin", lambda: _ledger(table / "ledger.bin", run)))
    for name in ("model.safetensors", "model.pt"):
        graphopt.train.export_run(table, folder / name, trust=True)
        found.append(Target(folder / name, partial(_digest, read_weights, folder / name)))
    saved = graphopt.save(run.plan, folder / "plan.safetensors")
    found.append(Target(saved, lambda: content_digest(read_plan_file(saved, plan=run.plan).module.state_dict())))
    return [*found, *_parts(folder / "parts"), *_features(folder / "features"), *_begun(folder / "begun"), *_data(folder)]


def _digest(read: Callable[[Path], Any], path: Path) -> str:
    return content_digest(read(path))


def _ledger(path: Path, run: small_run.SmallRun) -> list[str]:
    """What a ledger proves of a finished run, after the run was continued at its end."""
    steps = run.spec.train.epochs * (len(run.data.train) // run.spec.train.batch)
    LedgerFile(path, len(run.data.train), run.spec.train.batch, steps).close()
    return [str(epoch) for epoch in check_ledger(path, steps)]


def _parts(folder: Path) -> list[Target]:
    """Of the last checkpoint that has its tensors in parts: itself, and each part."""
    PartsRun().train(folder)
    last = folder / "last.pt"
    parts = sorted((folder / FOLDER / str(folder_of(last))).iterdir())
    return [
        Target(path, lambda: content_digest(load_checkpoint(last)), kind=kind)
        for path, kind in ((last, "last.pt of parts"), *((p, "a part") for p in parts))
    ]


LAYOUT = EntryLayout("0" * 32, 20, (4, 8, 8), torch.float32, 5)


def _fill(directory: CacheDirectory, chunks: int) -> tuple[int, CacheEntry | None]:
    """Fills an entry up to so many chunks, after those that are there; returns how many that were, and the entry when it is whole."""
    rows = torch.arange(LAYOUT.rows * 4 * 8 * 8, dtype=torch.float32).view(-1, 4, 8, 8)
    with directory.filling(LAYOUT) as fill:
        assert not isinstance(fill, CacheEntry)
        before = fill.done
        for number in range(before, chunks):
            first, end = LAYOUT.span(number)
            fill.write(number, rows[first:end], torch.arange(first, end))
        if chunks == LAYOUT.chunks:
            return before, fill.finish()
        fill.flush()
        return before, None


def _digests(entry: CacheEntry) -> tuple[str, str]:
    return content_digest(entry.features[0:20]), content_digest(entry.targets)


@contextmanager
def _mended(folder: Path, whole: Mapping[Path, bytes]) -> Iterator[None]:
    """Afterwards the folder holds these files, and no others."""
    try:
        yield
    finally:
        for path in {*folder.iterdir()} - whole.keys():
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)


def _features(folder: Path) -> list[Target]:
    """Of a whole entry. A damaged one is removed, and computed again."""
    _fill(CacheDirectory(folder, "d"), LAYOUT.chunks)
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def read() -> Any:
        with _mended(folder, whole):
            entry = CacheDirectory(folder, "d").open(LAYOUT)
            return None if entry is None else _digests(entry)

    return [Target(path, read) for path in sorted(whole) if path.suffix != ".lock"]


def _begun(folder: Path) -> list[Target]:
    """Of an entry that was begun. What is damaged of it is computed again, and in the end the entry is the same."""
    _fill(CacheDirectory(folder, "d"), 3)
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def read() -> Any:
        with _mended(folder, whole):
            before, entry = _fill(CacheDirectory(folder, "d"), LAYOUT.chunks)
            assert entry is not None
            found = _digests(entry)
            return None if before < 3 and found == expected else found

    with _mended(folder, whole):
        entry = _fill(CacheDirectory(folder, "d"), LAYOUT.chunks)[1]
        assert entry is not None
        expected = _digests(entry)
    return [Target(path, read) for path in sorted(whole) if path.suffix in (".part", ".progress")]


def _data(folder: Path) -> list[Target]:
    """Files of data sets: images in folders and in shards, and idx files. They have no digest of what they hold."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of the shards' index
    draw = np.random.RandomState(0)
    for split, number, kind in [(split, number, kind) for split in ("train", "val") for number in range(2) for kind in ("png", "jpg")]:
        image = Image.fromarray(draw.randint(0, 256, (8, 8, 3), np.uint8))
        path = folder / "folder" / split / f"class{number}" / f"{split}{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    for split in ("train", "val"):
        with tarfile.open(_parent(folder / "webdataset" / f"{split}-0.tar"), "w") as tar:
            for path in sorted((folder / "folder" / split).rglob("*.*")):
                key = f"{path.stem}{path.suffix[1]}"
                _add(tar, f"{key}{path.suffix}", path.read_bytes())
                _add(tar, f"{key}.cls", path.parent.name[-1].encode())
    for prefix in ("train", "t10k"):
        raw, images = folder / "mnist" / "MNIST" / "raw", draw.randint(0, 256, (4, 8, 8), np.uint8)
        _parent(raw / f"{prefix}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 8]) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 2, 3]))
    found = []
    for name in ("folder", "webdataset", "mnist"):
        spec = DataSpec(name=name, root=str(folder / name))
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        found += [Target(path, partial(_samples, spec), proof=False) for path in files]
    return found


def _samples(spec: DataSpec) -> list[str]:
    """Digests of all samples, as training and evaluation take them."""
    data = open_data(spec, (3, 8, 8), seed=0)
    return [content_digest(list(samples[0, number])) for samples in (data.train, data.evaluation) for number in range(len(samples))]


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def flip(folder: Path, count: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Damages files `count` times, all equally often; the outcomes by file, and the cases that are faults."""
    known, draw = targets(folder), random.Random(seed)
    found: dict[str, Counter[str]] = {_kind(target): Counter() for target in known}
    faults = []
    for number in range(count):
        target = known[number % len(known)]
        what, case = target.outcome(draw)
        found[_kind(target)][what] += 1
        if what in ("silent", "unclear"):
            faults.append(f"{number}: {what}: {case}")
    return found, faults


def _kind(target: Target) -> str:
    """What a file is called in the table."""
    if target.kind is not None:
        return target.kind
    name, suffix = target.path.name.replace("0" * 32, "<key>"), target.path.suffix
    if target.proof:
        return name
    return {".png": "PNG image", ".jpg": "JPEG image", ".tar": "tar shard"}.get(suffix, "idx images" if "images" in name else "idx labels")


def table(found: dict[str, Counter[str]]) -> list[str]:
    """Markdown: the outcomes by file."""
    lines = [f"| file | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 1) + "|"]
    rows = {**found, "all": sum(found.values(), Counter())}
    return lines + [f"| {name} | {' | '.join(f'{counts[what]:,}' for what in OUTCOMES)} |" for name, counts in rows.items()]
