"""What traces and what each pass makes of it, on backbones of many kinds: libraries' classifiers, dense models, user-written oddities.

    python tools/coverage.py --out tools/tables/coverage.md
    python tools/coverage.py --only own/ --limit 8

A pass is applied to about half of a backbone, alone, and fully verified; then one training step of the plan is forecast and measured, and
the export is loaded into the backbone's own class and compared. A refusal is an answer, and its reason is listed. Exit code 1 on a raw
traceback, a failed verification, an unequal figure or an unequal export.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cost_sweep import EXPLAINED, compared, fitting_input, options_on_half
from coverage_backbones import Candidate, candidates, left_out, parameters_of
from machine import heading
from on_graph import plan_on
from torch import nn

from graphopt import trace
from graphopt.compiler.registry import passes as installed
from graphopt.errors import CostError, GraphoptError, NeedsValuesError, VerifyError
from graphopt.ir.blocks import disjoint_parts, find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.graph import Graph
from graphopt.ir.shapes import tensors_in

CELLS = ("freeze", "behind", "mix", "surrogate", "drop", "bypass", "supervise", "memory", "checkpoint")
#: what makes the run fail
BAD = ("traceback", "not verified", "no forecast", "unequal", "export unequal")
#: relative difference of an export's output that counts as rounding
ROUNDING = 1e-5


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


@dataclass
class Row:
    """What came of one backbone: a word per column, and for each word that needs it the reason."""

    name: str
    input: str = ""
    words: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    exports: list[float] = field(default_factory=list)

    def put(self, column: str, word: str, reason: str = "") -> None:
        self.words[column] = word
        if reason:
            self.reasons[column] = reason

    def text(self) -> str:
        worst = max(self.exports, default=None)
        exported = "" if worst is None else "equal" if worst == 0 else f"{worst:.0e}"
        columns = ("traced", "blocks", "opaque", "cuts", "as it is", *CELLS)
        return "| " + " | ".join([self.name, self.input, *(self.words.get(c, "") for c in columns), exported]) + " |"


def cover(candidate: Candidate, cells: Sequence[str] = CELLS) -> Row:
    """One row. Nothing escapes: what goes wrong becomes a word."""
    row = Row(candidate.name)
    torch.manual_seed(0)
    try:
        module = candidate.build()
        shape = candidate.input or fitting_input(module)
        row.input = "x".join(map(str, shape))
        graph = trace(module, shape)
    except GraphoptError as error:
        row.put("traced", "no", first_line(error))
        return row
    except Exception as error:
        traceback.print_exc()
        row.put("traced", "traceback", f"{type(error).__name__}: {first_line(error)}")
        return row
    row.put("traced", "yes")
    row.put("blocks", str(len(find_blocks(graph))))
    row.put("opaque", str(len(graph.opaque)))
    row.put("cuts", str(len(cut_points(graph))))
    judge(row, "as it is", module, graph, targets=False)
    for cell in cells:
        _apply(row, cell, module, graph)
    return row


def _apply(row: Row, cell: str, module: nn.Module, graph: Graph) -> None:
    try:
        use, options = options_of(cell, graph)
        plan = plan_on(module, graph, (installed()[use].model_validate(options),), name=row.name, verify="full")
        if not plan.report.passes[0].regions:
            row.put(cell, "nothing", "accepted, but no region is changed")
            return
        judge(row, cell, plan.module, graph, targets=plan.needs.targets)
    except VerifyError as error:
        row.put(cell, "not verified", first_line(error))
        return
    except GraphoptError as error:
        row.put(cell, "no", first_line(error))
        return
    except Exception as error:
        traceback.print_exc()
        row.put(cell, "traceback", f"{type(error).__name__}: {first_line(error)}")
        return
    if cell != "surrogate":  # whose export is refused by design
        _export(row, cell, plan, graph)


def judge(row: Row, column: str, module: nn.Module, graph: Graph, *, targets: bool) -> None:
    """Puts whether the forecast of a step equals the measured one."""
    try:
        verdict = compared(module, graph.input, targets)[1]
    except NeedsValuesError as error:
        row.put(column, "ok, no forecast", first_line(error))
        return
    except CostError as error:
        row.put(column, "no forecast", first_line(error))
        return
    if verdict == "equal":
        row.put(column, "ok")
    elif row.name in EXPLAINED:
        row.put(column, "explained", f"{verdict}. {EXPLAINED[row.name]}")
    else:
        row.put(column, "unequal", verdict)


def _export(row: Row, cell: str, plan: Any, graph: Graph) -> None:
    x = torch.rand(2, *graph.input, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = [tensors_in(copy.deepcopy(m).eval()(x)) for m in (plan.module, plan.export())]
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


class Table:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []

    @property
    def counts(self) -> Counter[str]:
        return Counter(word for row in self.rows for column, word in row.words.items() if column in (*CELLS, "as it is"))

    @property
    def good(self) -> bool:
        return not any(word in BAD for row in self.rows for word in row.words.values())

    def totals(self) -> str:
        traced = Counter(row.words["traced"] for row in self.rows)
        cells = ", ".join(f"{n} {word}" for word, n in self.counts.most_common())
        exports = [e for row in self.rows for e in row.exports]
        equal = sum(e == 0 for e in exports)
        return (
            f"{len(self.rows)} backbones: {traced['yes']} traced, {traced['no']} refused with a reason, {traced['traceback']} tracebacks. "
            f"Cells: {cells or 'none'}. Exports: {equal} of {len(exports)} bit-equal, the largest relative difference is "
            f"{max(exports, default=0):.0e}."
        )

    def text(self) -> str:
        head = ["backbone", "input", "traced", "blocks", "opaque", "cut points", "as it is", *CELLS, "export"]
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            for column, reason in row.reasons.items():
                notes.setdefault(f"{row.words[column]}: {reason}", []).append(f"{row.name} {column}")
        missing = [f"not installed: {', '.join(left_out())}"] if left_out() else []
        over = [f"{len(self.skipped)} over the limit on parameters, rows or minutes: {', '.join(self.skipped)}"] if self.skipped else []
        return "\n".join(
            [
                heading("Backbones: what traces, what each pass makes of it, forecasts and exports", __doc__),
                "ok: compiled, fully verified, and the forecast of a step equals the measured one (saved and peak bytes, FLOPs). no:",
                "refused, the reason is below. `as it is`: the backbone without a pass. freeze: the first half; behind: one part in the",
                "middle, behind trainable ones; mix, surrogate: share every second block; drop: half as a prefix; bypass: all branches for",
                "good; supervise: two modules; memory: cuts by memory; checkpoint: two segments. export: the largest relative difference",
                "of all exports of the row.\n",
                f"{self.totals()}\n",
                f"Left out: {'; '.join([*missing, *over]) or 'nothing'}.\n",
                "| " + " | ".join(head) + " |",
                "|" + " --- |" * len(head),
                *(row.text() for row in self.rows),
                "",
                *(f"- {why} ({len(names)}: {', '.join(names)})" for why, names in sorted(notes.items())),
                "",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names that match this pattern, or contain it")
    parser.add_argument("--limit", type=int, default=None, help="at most so many backbones")
    parser.add_argument("--parameters", type=float, default=350e6, help="leave out larger ones")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no more backbones after so many")
    parser.add_argument("--out", type=Path, help="write the table there, after every backbone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table()
    chosen = (c for c in candidates() if fnmatch.fnmatch(c.name, options.only) or options.only in c.name)
    end = time.perf_counter() + 60 * options.minutes
    for candidate in chosen:
        start = time.perf_counter()
        if len(table.rows) == options.limit or start > end or parameters_of(candidate.build) > options.parameters:
            table.skipped.append(candidate.name)
            continue
        table.rows.append(cover(candidate))
        print(f"{table.rows[-1].text()} {time.perf_counter() - start:.0f} s", flush=True)
        if options.out:
            options.out.write_text(table.text())
    if options.out:
        options.out.write_text(table.text())
    print(table.totals())
    return 0 if table.good else 1


if __name__ == "__main__":
    sys.exit(main())
