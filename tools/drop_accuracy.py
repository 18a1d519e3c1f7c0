"""What drop costs in accuracy and saves in time on the embedded digits: the scored specs against the same runs without the pass.

    nice python tools/drop_accuracy.py --seeds 5 --out tools/tables/drop_accuracy.md

For each seed both runs are made one after the other, so that a busy machine slows both; the wall time includes evaluation, filling, and
every change of phase. Processor time is given beside it, because a neighbour's load moves it less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import heading

from graphopt.diff.render.run import read_run
from graphopt.driver import build_backbone as build
from graphopt.driver import compile
from graphopt.planning.run_cost import counts, forecast_run
from graphopt.spec import load
from graphopt.train import train

SPECS = ("learn_and_drop/digits-resnet32", "learn_and_drop/digits-vgg11")


def run(name: str, seed: int, whole: bool) -> dict[str, Any]:
    """One training run; `whole` leaves the pass out."""
    spec = load(name, overrides=[f"train.seed={seed}", "train.device=cpu"])
    bare = spec.model_copy(update={"passes": ()}) if whole else spec
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        summary = train(bare, Path(folder) / "run")
        found: dict[str, Any] = {
            "accuracy": summary.accuracy,
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
        }
        if not whole:
            plan = compile(build(spec.backbone), spec, verify="off", costs=False)
            samples, evaluated = counts(spec.data)
            work = forecast_run(plan, spec.train, samples=samples, evaluated=evaluated, decisions=read_run(Path(folder) / "run").decisions)
            taken = [f"{d.epoch}: {d.regions[-1]}" for phase in work.phases for d in phase.decisions if d.regions]
            found |= {"saved": work.forward_saved, "final": work.final_forward_saved, "decisions": ", ".join(taken)}
            lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
            found["kept"] = all(line["kept"] for line in lines if line["kind"] == "features")
    return found


def _write(lines: list[str], out: Path | None) -> None:
    """What there is so far: a run that is stopped has not been for nothing."""
    print(lines[-1], flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("specs", nargs="*", default=SPECS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [heading("drop: accuracy and time on digits", __doc__)]
    for name in options.specs:
        columns = ("seed", "whole", "dropped", "points", "wall ratio", "processor ratio", "forward saved, run", "at the end", "decisions")
        lines += [f"\n## {name}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        rows = []
        for seed in range(options.seeds):
            whole, dropped = run(name, seed, True), run(name, seed, False)
            row = {
                "points": 100 * (dropped["accuracy"] - whole["accuracy"]),
                "wall": dropped["wall"] / whole["wall"],
                "processor": dropped["processor"] / whole["processor"],
            }
            rows.append(row)
            lines.append(
                f"| {seed} | {100 * whole['accuracy']:.2f} | {100 * dropped['accuracy']:.2f} | {row['points']:+.2f} | {row['wall']:.2f} "
                f"| {row['processor']:.2f} | {100 * dropped['saved']:.1f} % | {100 * dropped['final']:.1f} % "
                f"| {dropped['decisions']}{'' if dropped['kept'] else ' (not kept)'} |"
            )
            _write(lines, options.out)
        means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        spread = statistics.stdev(row["points"] for row in rows) if len(rows) > 1 else 0.0
        lines.append(f"| mean | | | {means['points']:+.2f} ± {spread:.2f} | {means['wall']:.2f} | {means['processor']:.2f} | | | |")
        _write(lines, options.out)


if __name__ == "__main__":
    main()
