"""A training run that has everything, and takes a second: what the tools that damage files train."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graphopt import Plan, compile
from graphopt.data.loader import open_data
from graphopt.driver import build_backbone
from graphopt.errors import RunError
from graphopt.files import unsealed
from graphopt.hashing import content_digest
from graphopt.spec import Spec, loads
from graphopt.train import train
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.parts import FOLDER, folder_of

#: phases: the stem's features, then those of the first block are cached on disk (filled from the stem's); then the last block is frozen
SPEC = """
name = "small"
[backbone]
source = "python"
name = "small_run:backbone"
input = [1, 8, 8]
[[pass]]
use = "freeze"
select = "three"
when = { epoch = 3 }
[[pass]]
use = "drop"
cache = "disk"
force = true
when = [{ epoch = 1, upto = "stem" }, { epoch = 2, upto = "one" }]
[[pass]]
use = "supervise"
cuts = ["two"]
decoder = "none"
[data]
name = "digits"
train_limit = 20
eval_limit = 10
[train]
epochs = 4
ledger = true
batch = 5
seed = 3
device = "cpu"
keep = 4
ema = 0.9
checkpoint_steps = 3
log_every = 2
optimizer = { name = "adamw", lr = 0.01 }
"""
#: what depends on the clock, on the process, or (`chain`) on what a rank has done since it was started
TIMES = {"seconds", "samples_per_second", "step_seconds", "peak_bytes", "epoch_began", "folder", "chain"}


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def backbone() -> nn.Module:
    """Three blocks of four channels."""
    parts = {"stem": _block(1, 4), "one": _block(4, 4), "two": _block(4, 4), "three": _block(4, 4), "pool": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(OrderedDict(**parts, flat=nn.Flatten(), fc=nn.Linear(4, 10)))


class SmallRun:
    """A spec that is compiled and whose data are open, so that a forked process begins to train at once."""

    def __init__(self, text: str = SPEC, *, tensorboard: bool = False) -> None:
        self.spec: Spec = loads(text)
        self.tensorboard = tensorboard
        self.plan: Plan = compile(build_backbone(self.spec.backbone, trust=True), self.spec, verify="off", costs=False, trust=True)
        self.plan.check_phases(self.spec.train.epochs)  # fills torch's caches, which forked processes have then
        self.data = open_data(self.spec.data, self.spec.backbone.input, self.spec.train.seed)

    def train(self, folder: Path) -> None:
        """Starts or continues the run in `folder`."""
        train(self.plan, folder, resume=True, data=self.data, tensorboard=self.tensorboard)


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_times(part) for key, part in value.items() if key not in TIMES}
    return [_without_times(part) for part in value] if isinstance(value, list | tuple) else value


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run has made, by file, but for what depends on the clock: of checkpoints a digest of every bit.

    Parts are in the digests of their checkpoints; of other parts, which no checkpoint has, there are the names.
    """
    found: dict[str, Any] = {}
    for run in {path.parent for path in folder.rglob("last.pt") if (path.parent / FOLDER).exists()}:
        used = {folder_of(path) for path in run.glob("*.pt")}
        found[f"parts that no checkpoint of {run.relative_to(folder)} has"] = sorted(set(os.listdir(run / FOLDER)) - used)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "events.out.tfevents" in name or FOLDER in path.relative_to(folder).parts:
            continue
        if path.suffix == ".pt":
            parts = {part: value for part, value in load_checkpoint(path).items() if not part.startswith("metrics_")}
            found |= {f"{name}, {part}": content_digest(_without_times(value)) for part, value in parts.items()}
        elif path.name == "metrics.jsonl":
            found |= {f"{name}, {kind}": records for kind, records in _records(path)}
        else:
            found[name] = _without_times(unsealed(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a kind, in order. A resumed run reports anew that it is resumed, and where it found its features."""
    kinds: dict[str, list[Any]] = {}
    for record in map(unsealed, path.read_text().splitlines()):
        kinds.setdefault(record["kind"], []).append(_without_times(record))
    cuts = [(record["cut"], record["kept"]) for record in kinds.pop("features", [])]
    kinds.pop("resume", None)
    yield from kinds.items()
    yield "features", list(dict.fromkeys(cuts))


def differences(folder: Path, expected: Mapping[str, Any]) -> list[str]:
    """What of a finished run is not as expected."""
    try:
        found = result(folder)
    except (RunError, ValueError) as error:
        return [str(error)]
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name, ...) != expected.get(name, ...)]
