"""Short trainings on Fashion-MNIST with random crops and flips, and their comparison with plain ones of the same seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from graphopt.spec import from_table
from graphopt.train import train
from graphopt.train.run import Run

#: test images of the evaluation, which is made once, at the end
EVALUATED = 3_000
CAPTION = "\nTrained on 1,000 images (or `--images`) of Fashion-MNIST, evaluated on 3,000: a sampling error of 0.8 points.\n\n"


@dataclass(frozen=True)
class Result:
    """Of one run: accuracy in percent, processor seconds of each epoch with whatever comes before it, and the records of its features."""

    accuracy: float
    seconds: Sequence[float]
    features: Sequence[Mapping[str, Any]]


#: results by seed
Runs = Mapping[int, Result]


def run(passes: Sequence[Mapping[str, Any]], seed: int, root: str, images: int, epochs: int) -> Result:
    """Trains ResNet-20 at 28 px on so many images, on one thread."""
    torch.set_num_threads(1)
    table: dict[str, Any] = {
        "backbone": {"source": "cifar", "name": "resnet20", "arguments": {"num_classes": 10, "in_chans": 1}, "input": [1, 28, 28]},
        "data": {"name": "fashion_mnist", "root": root, "train_limit": images, "eval_limit": EVALUATED},
        "train": {"epochs": epochs, "batch": 32, "seed": seed, "device": "cpu", "eval_every": epochs, "optimizer": {"lr": 0.1}},
        "pass": list(passes),
    }
    table["data"]["augment"] = {"crop": "pad", "hflip": 0.5}
    with tempfile.TemporaryDirectory() as folder:
        stamps, close = [time.process_time()], Run._close_epoch

        def noted(self: Run) -> None:
            stamps.append(time.process_time())  # before the evaluation, which all methods have
            close(self)

        Run._close_epoch = noted  # type: ignore[method-assign]  # watched for this tool
        try:
            summary = train(from_table(table), Path(folder) / "run")
        finally:
            Run._close_epoch = close  # type: ignore[method-assign]  # watched for this tool
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        features = tuple(line for line in lines if line["kind"] == "features")
    assert summary.accuracy is not None
    return Result(100 * summary.accuracy, tuple(b - a for a, b in pairwise(stamps)), features)


def points(mine: Runs, plain: Runs) -> str:
    """Mean difference of accuracy over the seeds, in points, and its standard deviation."""
    found = [run.accuracy - plain[seed].accuracy for seed, run in mine.items()]
    return f"{statistics.mean(found):+.2f}" + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def ratio(mine: Runs, plain: Runs, first: int = 0) -> str:
    """Processor time from epoch `first` on, over that of plain training, averaged over the seeds."""
    return f"{statistics.mean(sum(run.seconds[first:]) / sum(plain[seed].seconds[first:]) for seed, run in mine.items()):.2f}"


def compare(
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    about: str | None,
    epochs: int,
    show: Callable[[Mapping[str, Runs]], str],
) -> None:
    """Runs each method with each seed, and prints what `show` makes of the results.

    Runs that a file has already are not made again; with `--no-runs`, none is, and methods without any are left out.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the published files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="for training")
    parser.add_argument(
        "--results", type=Path, required=True, help="a file of runs, to which others are added; several processes may share it"
    )
    parser.add_argument("--no-runs", action="store_true", help="only the table of what there is")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for seed in options.seeds:
        for name, passes in methods.items():
            if not options.no_runs and seed not in _known(options.results).get(name, {}):
                result = run(passes, seed, options.root, options.images, epochs)
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([seed, name, asdict(result)]) + "\n")
    known = _known(options.results)
    page = show({name: known[name] for name in methods if name in known})
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    print(page)


def _known(file: Path) -> dict[str, Runs]:
    found: dict[str, dict[int, Result]] = {}
    for seed, name, values in map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else ()):
        found.setdefault(name, {})[seed] = Result(**values)
    return dict(found)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]) + "\n"
