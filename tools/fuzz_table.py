"""What became of drawn compositions, as a table that grows with each run of `fuzz_passes.py`."""

import argparse
import datetime
import json
import re
from collections import Counter
from dataclasses import dataclass

from fuzz_draws import Table
from machine import heading

from graphopt.compiler import registry

#: what a table's own data follow
COMMENT = "<!-- runs: "
#: what can become of a case
STATUSES = ("accepted", "refused", "refused later", "violation")


@dataclass(frozen=True)
class Outcome:
    """What became of a case, one of `STATUSES`; why; and what kind of violation it is."""

    status: str
    reason: str = ""
    kind: str = ""


def plain(reason: str) -> str:
    """A reason without the names and numbers of one case, so that equal ones can be counted."""
    named = re.sub(r"'[^']*'|\b[a-z_]+(\.[\w-]+)+\b", "...", reason.replace("|", "/"))
    return " ".join(re.sub(r"\d+", "N", named).partition(":")[0].split())[:110]


def write_table(options: argparse.Namespace, found: list[tuple[Table, Outcome]], about_draws: str | None) -> None:
    """Adds one run to the table, or takes the place of an earlier one of the same draws. A comment in it holds what it is made from."""
    old = options.out.read_text() if options.out.exists() else ""
    runs: dict[str, Table] = json.loads(old.rpartition(COMMENT)[2].partition(" -->")[0]) if COMMENT in old else {}
    counts = Counter(outcome.status for _, outcome in found)
    reasons = Counter(plain(outcome.reason) for _, outcome in found if outcome.status.startswith("refused"))
    about = {"on": str(datetime.date.today()), "passes": len(registry.names())}
    runs[f"{options.seed} | {options.first}"] = {"counts": [counts[status] for status in STATUSES], "reasons": reasons, **about}
    total = [sum(column) for column in zip(*(run["counts"] for run in runs.values()), strict=True)]
    lines = [heading("Drawn compositions of passes", about_draws), "Each run has a row; the command is the last one's.", ""]
    lines += ["| seed | draws | on | of passes | " + " | ".join(STATUSES) + " |", "|---" * 8 + "|"]
    for name, run in sorted(runs.items()):
        seed, first = name.split(" | ")
        draws = f"{first} to {int(first) + sum(run['counts']) - 1}"
        lines.append(f"| {seed} | {draws} | {run['on']} | {run['passes']} | {' | '.join(map(str, run['counts']))} |")
    lines += [f"| all | {sum(total)} | | | {' | '.join(map(str, total))} |", "", "| refused because | draws |", "|---|---|"]
    merged = sum((Counter(run["reasons"]) for run in runs.values()), Counter[str]())
    lines += [f"| {reason} | {count} |" for reason, count in merged.most_common()]
    options.out.write_text("\n".join([*lines, "", f"{COMMENT}{json.dumps(runs)} -->"]) + "\n")
