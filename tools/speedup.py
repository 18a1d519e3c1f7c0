"""What `graphopt fit --speedup 2` proposes beside plain training and half of its epochs: processor time and accuracy, with crop and flip.

    python tools/speedup.py --data fashion --root /usr/share/datasets/fashion-mnist --work build/speedup --out tools/tables/speedup.md
    python tools/speedup.py --data digits --work build/speedup-digits

ResNet-20 on 10,000 images of Fashion-MNIST at 28 px (20 epochs; evaluated on all 10,000 test images after each), or on scikit-learn's
digits. Each run is a process of its own on one thread; its processor time is all that it took, the start included, and so is that of
`fit`, once for all seeds. Runs that are in `--work` already are not made again; several processes may share it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import heading

from graphopt.spec import dumps, from_table, load

DATA: dict[str, dict[str, Any]] = {
    "fashion": {
        "input": [1, 28, 28],
        "data": {"name": "fashion_mnist", "train_limit": 10_000, "eval_limit": 10_000},
        "train": {"epochs": 20, "batch": 128},
    },
    "digits": {"input": [1, 8, 8], "data": {"name": "digits"}, "train": {"epochs": 200, "batch": 64, "eval_every": 5}},
}
PLAIN, HALF = "plain training", "half of the epochs"


def spec_of(name: str, root: str | None) -> dict[str, Any]:
    """The spec of plain training."""
    about = DATA[name]
    data = {**about["data"], **({"root": root} if root else {}), "augment": {"crop": "pad", "hflip": 0.5}}
    train = {**about["train"], "device": "cpu", "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4}, "scheduler": "cosine"}
    network = {"source": "cifar", "name": "resnet20", "arguments": {"num_classes": 10, "in_chans": 1}, "input": about["input"]}
    return {"name": "plain training", "backbone": network, "data": data, "train": train}


def spent(*command: str) -> float:
    """Processor seconds of a command of graphopt on one thread. Ends this tool if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "graphopt", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def proposals(work: Path, name: str, root: str | None, factors: Sequence[float]) -> dict[str, Path]:
    """The specs to compare, by their names; what `fit` proposes is made once and kept in `work`."""
    plain, half = work / "plain.toml", work / "half.toml"
    table = spec_of(name, root)
    plain.write_text(dumps(from_table(table), defaults=False), encoding="utf-8")
    epochs = table["train"]["epochs"] // 2
    half.write_text(dumps(from_table({**table, "train": {**table["train"], "epochs": epochs}}), defaults=False), encoding="utf-8")
    found = {PLAIN: plain, HALF: half}
    for factor in factors:
        made = found[f"fit --speedup {factor:g}"] = work / f"fit-{factor:g}.toml"
        if not made.exists():
            seconds = spent("fit", str(plain), "--speedup", str(factor), "-o", str(made))
            made.with_suffix(".json").write_text(json.dumps(seconds), encoding="utf-8")
    return found


def run(spec: Path, seed: int) -> tuple[float, float]:
    """Accuracy in percent and processor seconds of a training run."""
    out = spec.with_suffix("") / f"seed{seed}"
    result = out.with_suffix(".json")
    if not result.exists():
        seconds = spent("train", str(spec), "-o", str(out), "--seed", str(seed))
        accuracy = json.loads((out / "summary.json").read_text(encoding="utf-8"))["accuracy"]
        result.write_text(json.dumps([100 * accuracy, seconds]), encoding="utf-8")
    accuracy, seconds = json.loads(result.read_text(encoding="utf-8"))
    return accuracy, seconds


def rows(found: Mapping[str, Mapping[int, tuple[float, float]]]) -> list[tuple[str, ...]]:
    """A row per spec, its differences paired by seed."""
    plain, shown = found[PLAIN], list[tuple[str, ...]]()
    for name, runs in found.items():
        accuracy = statistics.mean(accuracy for accuracy, _ in runs.values())
        differences = [accuracy - plain[seed][0] for seed, (accuracy, _) in runs.items()]
        error = f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
        points = "" if name == PLAIN else f"{statistics.mean(differences):+.2f}{error}"
        seconds = statistics.mean(seconds for _, seconds in runs.values())
        ratio = statistics.mean(seconds / plain[seed][1] for seed, (_, seconds) in runs.items())
        shown.append((name, str(len(runs)), f"{accuracy:.2f}", points, f"{seconds:.0f}", f"{ratio:.2f}"))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--root", help="folder of the published files")
    parser.add_argument("--work", type=Path, required=True, help="folder of specs, runs and their results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[2.0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    specs = proposals(options.work, options.data, options.root, options.factors)
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in specs}
    for seed in options.seeds:
        for name, spec in specs.items():
            spec.with_suffix("").mkdir(exist_ok=True)
            found[name][seed] = run(spec, seed)
            print(f"{name}, seed {seed}: {found[name][seed][0]:.2f} %, {found[name][seed][1]:.0f} s", flush=True)
    columns = ("", "seeds", "accuracy, %", "points", "processor seconds", "of plain training's")
    lines = [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows(found)]]
    for name, spec in specs.items():
        if spec.with_suffix(".json").exists():
            fast, seconds = load(spec), json.loads(spec.with_suffix(".json").read_text(encoding="utf-8"))
            changes = dumps(fast, defaults=False)
            lines.append(f"\nWhat `{name}` wrote, in {seconds:.0f} processor seconds:\n\n```toml\n{changes}```")
    title = {"fashion": "Twice as fast on Fashion-MNIST", "digits": "Twice as fast on digits"}[options.data]
    page = heading(title, __doc__) + "\nAfter ±: the standard error of the difference, paired by seed.\n\n" + "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
