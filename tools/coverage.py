"""What traces and what each pass makes of it, on backbones of many kinds: libraries' classifiers, dense models, user-written oddities.

    python tools/coverage.py --jobs 2 --out tools/tables/coverage.md
    python tools/coverage.py --resume --only 'own/*' --out tools/tables/coverage.md

A pass is applied to about half of a backbone, alone, and fully verified; then one training step of the plan is forecast and measured, and
the export is loaded into the backbone's own class and compared. A refusal is an answer, and its reason is listed. Every row is made in a
forked process and added to a file; with `--resume`, rows of that file that are good are taken over. Exit code 1 on a raw traceback, a
failed verification, an unequal figure, an unequal export, a row that ran into a limit or that was left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import itertools
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from coverage_backbones import Candidate, candidates, fitting, parameters_of
from coverage_table import CELLS, Row, Table
from on_graph import plan_on
from torch import nn

from graphopt import trace
from graphopt.compiler.registry import passes as installed
from graphopt.compiler.runs import seeded
from graphopt.cost import Cost, forecast, measure
from graphopt.errors import CostError, GraphoptError, NeedsValuesError, VerifyError
from graphopt.ir.blocks import disjoint_parts, find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input, samples, tensors_of
from graphopt.ir.shapes import tensors_in
from graphopt.planning.run_cost import drop_points

#: known outliers, and why
EXPLAINED = {
    "timm/sequencer2d_s": "oneDNN's LSTM hands its workspace to the backward; only the kernel knows its size, the fake one gives none",
}
#: relative difference of an export's output that counts as rounding
ROUNDING = 1e-5


def options_on_half(use: str, graph: Graph) -> dict[str, Any]:
    """Options that make a built-in pass change about half of the backbone."""
    names = [r.name for r in disjoint_parts(graph) if r.parameters]
    ends = [point.name for point in drop_points(graph)]
    options: dict[str, dict[str, Any]] = {
        "freeze": {"select": names[: max(1, len(names) // 2)]},
        "share": {"every": 2, "boundary": "nearest"},
        "drop": {"upto": ends[(len(ends) - 1) // 2] if ends else names[0]},
        "supervise": {"modules": 2},
        "checkpoint": {"segments": 2},
    }
    return options[use]


def compared(module: nn.Module, size: Input, targets: bool = False) -> tuple[Cost, str]:
    """The forecast, and "equal" or what is not. Both sides are the same instrument, on fake and on real tensors."""
    expected, found = forecast(module, size, 2, targets=targets), measure(module, size, 2, targets=targets)
    keys = ("saved_activation_bytes", "peak_activation_bytes", "peak_bytes", "forward_flops", "backward_flops")
    wrong = {k: (getattr(expected, k), getattr(found, k)) for k in keys if getattr(expected, k) != getattr(found, k)}
    return expected, "; ".join(f"{k} {a:,} forecast, {b:,} real ({a / b:.4f})" for k, (a, b) in wrong.items()) or "equal"


def options_of(cell: str, graph: Graph) -> tuple[str, dict[str, Any]]:
    """The pass of a column, and its options on this backbone."""
    value = graph.output.args[0]
    shape = getattr(getattr(value, "meta", {}).get("val"), "shape", ())
    classes = {} if len(shape) == 2 else {"classes": 5}
    names = [r.name for r in disjoint_parts(graph) if r.parameters]
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "behind": ("freeze", {"select": names[len(names) // 2]}),
        "mix": ("share", options_on_half("share", graph)),
        "surrogate": ("share", {**options_on_half("share", graph), "mode": "surrogate"}),
        "bypass": ("drop", {"mode": "bypass"}),
        "supervise": ("supervise", {"modules": 2, **classes}),
        "memory": ("supervise", {"balance": "memory", **classes}),
    }
    return made[cell] if cell in made else (cell, options_on_half(cell, graph))


def cover(candidate: Candidate, cells: Sequence[str] = CELLS) -> Row:
    """One row. Nothing escapes: what goes wrong becomes a word."""
    row = Row(candidate.name)
    torch.manual_seed(0)
    try:
        module, shape = fitting(candidate)
        row.input = " and ".join("x".join(map(str, sizes)) or "1" for sizes, _ in tensors_of(shape))
        graph = trace(module, shape)
    except Exception as error:
        _refused(row, "traced", error)
        return row
    row.put("traced", "yes")
    row.put("blocks", str(len(find_blocks(graph))))
    row.put("opaque", str(len(graph.opaque)))
    row.put("cuts", str(len(cut_points(graph))))
    for opaque in graph.opaque[:1]:
        row.reasons["opaque"] = f"{opaque.path}: {opaque.reason}"[:220].replace("|", "/")
    judge(row, "as it is", module, graph, targets=False)
    for cell in cells:
        _apply(row, cell, module, graph)
        gc.collect()  # a plan refers to itself: large ones would be there until Python happens to look
    return row


def _refused(row: Row, column: str, error: Exception) -> None:
    """Puts what an error means for a column."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        row.put(column, "limit", "out of the memory that a row may take")
    elif isinstance(error, VerifyError):
        row.put(column, "not verified", first_line(error))
    elif isinstance(error, GraphoptError):
        row.put(column, "no", first_line(error))
    else:
        traceback.print_exception(error)
        row.put(column, "traceback", f"{type(error).__name__}: {first_line(error)}")


def _apply(row: Row, cell: str, module: nn.Module, graph: Graph) -> None:
    try:
        use, options = options_of(cell, graph)
        plan = plan_on(module, graph, (installed()[use].model_validate(options),), name=row.name, verify="full")
        if not plan.report.passes[0].regions:
            row.put(cell, "nothing", "accepted, but no region is changed")
            return
        judge(row, cell, plan.module, graph, targets=plan.needs.targets)
        if cell != "surrogate":  # whose export is refused by design
            _export(row, cell, plan, graph)
    except Exception as error:
        _refused(row, cell, error)


def judge(row: Row, column: str, module: nn.Module, graph: Graph, *, targets: bool) -> None:
    """Puts whether the forecast of a step equals the measured one."""
    try:
        verdict = compared(module, graph.input, targets)[1]
    except NeedsValuesError as error:
        row.put(column, "ok, no forecast", first_line(error))
        return
    except CostError as error:
        if "can't allocate memory" in str(error):
            raise
        row.put(column, "no forecast", first_line(error))
        return
    if verdict == "equal":
        row.put(column, "ok")
    elif row.name in EXPLAINED:
        row.put(column, "explained", f"{verdict}. {EXPLAINED[row.name]}")
    else:
        row.put(column, "unequal", verdict)


def _export(row: Row, cell: str, plan: Any, graph: Graph) -> None:
    """Puts whether the export computes what the plan does; the plan's own norms move no more."""
    given = samples(graph.input, 2, functools.partial(torch.rand, generator=torch.Generator().manual_seed(3)))
    outputs = []
    for module in (plan.module, plan.export()):
        with torch.no_grad(), seeded():  # some draw in eval mode, too
            outputs.append([t.clone() for t in tensors_in(module.eval()(*given))])
    pairs = list(itertools.zip_longest(*outputs))
    if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
        row.put(cell, "export unequal", "other outputs")
        return
    worst = max((((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() for a, b in pairs if a.numel()), default=0.0)
    row.exports.append(worst)
    if not worst <= ROUNDING:
        row.put(cell, "export unequal", f"relative difference {worst:.1e}")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:220].replace("|", "/") if str(error) else ""


# -- rows in processes of their own -------------------------------------------------------------------------------------------
def _child(candidate: Candidate, options: argparse.Namespace, results: Connection) -> None:
    start = time.process_time()
    # Autograd's threads would do this at once, each by itself, and abort where they meet.
    torch.set_num_threads(1)
    if options.memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(options.memory * 2**30), -1))
    if options.parameters < float("inf") and parameters_of(candidate.build) > options.parameters:
        row = Row(candidate.name).put("traced", "left out", f"more than {options.parameters / 1e6:.0f} M parameters")
    else:
        row = cover(candidate)
    row.seconds = time.process_time() - start
    results.send(row)


def rows(chosen: Sequence[Candidate], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of these backbones as they come, from `--jobs` forked processes at a time."""
    context, waiting = multiprocessing.get_context("fork"), list(reversed(chosen))
    running: dict[Any, tuple[Candidate, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            results, end = context.Pipe(duplex=False)
            candidate = waiting.pop()
            process = context.Process(target=_child, args=(candidate, options, end))
            process.start()
            end.close()
            running[results] = (candidate, process, time.monotonic())
        ready = wait(list(running), timeout=1)
        for results, (candidate, process, start) in list(running.items()):
            late = time.monotonic() - start > options.seconds
            if results not in ready and not late:
                continue
            try:
                row = results.recv() if results in ready else Row(candidate.name).put("traced", "limit", f"over {options.seconds:.0f} s")
            except EOFError:
                process.join()
                row = Row(candidate.name).put("traced", "died", f"its process ended with {process.exitcode}")
            process.kill()
            process.join()
            del running[results]
            yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names that match this pattern, or contain it")
    parser.add_argument("--limit", type=int, default=None, help="at most so many backbones")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--parameters", type=float, default=float("inf"), help="leave out larger ones")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop a row after so many")
    parser.add_argument("--memory", type=float, help="GiB that a row may take")
    parser.add_argument("--rows", type=Path, default=Path("build/coverage.jsonl"), help="the file of rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and make those that are missing or not good")
    parser.add_argument("--out", type=Path, help="write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    installed()  # loaded once, here: all children share them
    os.environ["HF_HUB_OFFLINE"] = "1"
    everything = list(candidates(options.rows.parent))
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        options.rows.unlink(missing_ok=True)
    table = Table([c.name for c in everything], options.rows)
    chosen = [c for c in everything if fnmatch.fnmatch(c.name, options.only) or options.only in c.name]
    missing = [c for c in chosen if c.name not in table.rows or not table.rows[c.name].good]
    for row in rows(missing[: options.limit], options):
        table.add(row)
        print(f"{row.text()} {row.seconds:.0f} s", *(f"\n    {k} {row.words[k]}: {v}" for k, v in row.bad.items()), flush=True)
        if options.out:
            options.out.write_text(table.text(__doc__))
    if options.out:
        options.out.write_text(table.text(__doc__))
    print(table.totals())
    return 0 if table.good else 1


if __name__ == "__main__":
    sys.exit(main())
