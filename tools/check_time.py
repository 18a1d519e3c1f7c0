"""Processor time of `graphopt check` on every installed spec, beyond the imports, and of compiling with full verification.

    python tools/check_time.py --out tools/tables/check_time.md

Each spec is checked in a process of its own, without its data, after all that check imports: seconds are those of the command alone. The
last row is the compilation of ResNet-152 (224 px, first half frozen) with full verification, over a training step of it at batch 32 in the
same process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import heading

import graphopt
from graphopt.compiler.registry import passes
from graphopt.spec.reading import installed


def seconds_of_check(spec: str) -> float:
    """In this process, which must not have checked anything before."""
    import timm  # noqa: F401  # these three are imports, not work
    import torchvision.models  # noqa: F401

    import graphopt.planning.device
    import graphopt.train.preflight  # noqa: F401
    from graphopt.cli import main as command

    errors = io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = command(["check", spec])
    seconds = time.process_time() - start
    # Data that is not here is reported at the end, after all the work.
    if status and "data" not in errors.getvalue():
        raise SystemExit(errors.getvalue())
    return seconds


def verified_over_step(name: str = "resnet152", batch: int = 32, part: int = 4) -> tuple[float, float]:
    """Seconds of a compilation with full verification, and of a training step; the step is measured on `part` samples and scaled."""
    import torchvision

    model = torchvision.models.get_model(name)
    value = passes()["freeze"].model_validate({"select": [{"blocks": True, "first": 0.5}]})
    start = time.process_time()
    graphopt.compile(model, value, input=(3, 224, 224), batch=batch)
    compiled = time.process_time() - start
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.rand(part, 3, 224, 224), torch.arange(part)
    steps = []
    for _ in range(2):
        start = time.process_time()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.process_time() - start)
    return compiled, min(steps) * batch / part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--specs", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(seconds_of_check(options.one))
        return
    names = options.specs or list(installed())
    lines = [heading("Time of check", __doc__), "| spec | processor seconds beyond imports |", "|---|---|"]
    for name in names:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        lines.append(f"| {name} | {float(done.stdout.splitlines()[-1]):.1f} |")
        print(lines[-1], flush=True)
    compiled, step = verified_over_step()
    lines.append(f"\nResNet-152, compiled with full verification: {compiled:.1f} s, {compiled / step:.2f} of a training step at batch 32.")
    print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
