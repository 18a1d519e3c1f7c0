"""Flips bits of files that graphopt reads and cuts them short: each time there is an error, or what is read is the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import small_run
import torch

import graphopt
from graphopt.diff.render.run import read_run
from graphopt.errors import GraphoptError
from graphopt.hashing import content_digest
from graphopt.models.weights import read_weights
from graphopt.plan_file import read_plan_file
from graphopt.spec import load
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.feature_cache.store import CacheDirectory, CacheEntry, EntryLayout

OUTCOMES = ("refused with the file's name", "computed again", "harmless", "silent", "unclear")


@dataclass
class Target:
    """A file, and what of it is used: `read` returns that, or None where it is computed again."""

    path: Path
    read: Callable[[], Any]
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
        return ("computed again" if found is None else "harmless" if found == self.expected else "silent"), case


def targets(folder: Path) -> list[Target]:
    """The files of a finished run, what it exports, and cached features."""
    run = small_run.SmallRun()
    run.train(folder / "run")
    found = [Target(path, lambda path=path: content_digest(load_checkpoint(path))) for path in sorted((folder / "run").glob("*.pt"))]
    table = folder / "run"

    def read() -> Any:
        seen = read_run(table)
        return seen, load(table).resolved()

    found += [Target(table / name, read) for name in ("metrics.jsonl", "summary.json", "spec.toml", "run.json")]
    for name in ("model.safetensors", "model.pt"):
        graphopt.train.export_run(table, folder / name, trust=True)
        found.append(Target(folder / name, lambda path=folder / name: content_digest(read_weights(path))))
    saved = graphopt.save(run.plan, folder / "plan.safetensors")
    found.append(Target(saved, lambda: content_digest(read_plan_file(saved, plan=run.plan).module.state_dict())))
    return found + _features(folder / "features")


def _features(folder: Path) -> list[Target]:
    layout = EntryLayout("0" * 32, 20, (4, 8, 8), torch.float32, 5)
    directory = CacheDirectory(folder, "d")
    with directory.filling(layout) as fill:
        assert not isinstance(fill, CacheEntry)
        for number, (first, end) in enumerate(fill.missing):
            fill.write(number, torch.randn(end - first, 4, 8, 8), torch.arange(first, end))
        fill.finish()
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def read() -> Any:
        try:
            entry = CacheDirectory(folder, "d").open(layout)
            return None if entry is None else (content_digest(entry.features[0:20]), content_digest(entry.targets))
        finally:
            for path, content in whole.items():  # a damaged entry is removed
                path.write_bytes(content)

    return [Target(path, read) for path in sorted(whole)]


def flip(folder: Path, count: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Damages files `count` times, all equally often; the outcomes by file, and the cases that are faults."""
    known, draw = targets(folder), random.Random(seed)
    found: dict[str, Counter[str]] = {target.path.name.replace("0" * 32, "<key>"): Counter() for target in known}
    faults = []
    for number in range(count):
        target = known[number % len(known)]
        what, case = target.outcome(draw)
        found[target.path.name.replace("0" * 32, "<key>")][what] += 1
        if what in ("silent", "unclear"):
            faults.append(f"{number}: {what}: {case}")
    return found, faults


def table(found: dict[str, Counter[str]]) -> list[str]:
    """Markdown: the outcomes by file."""
    lines = [f"| file | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 1) + "|"]
    rows = {**found, "all": sum(found.values(), Counter())}
    return lines + [f"| {name} | {' | '.join(f'{counts[what]:,}' for what in OUTCOMES)} |" for name, counts in rows.items()]
