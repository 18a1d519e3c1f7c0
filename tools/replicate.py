"""Every figure that a study's file says is published, beside ours, with the command that prints ours.

    python tools/replicate.py [--only TEXT] [--out tools/tables/replicate.md]

The published figures are written in the studies alone (`specs/studies/`, `[[published]]`). Where a figure of one row is published, the
other rows of that study are here too. Ours are forecasts of one training step or of one run (FLOPs, parameters, live bytes): exact, never a
published number. A paper's memory is what a GPU held, ours live bytes: ratios compare. Accuracies and times take the papers' data and
devices: `graphopt study` measures them, and shows them beside the same published figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from machine import heading

from graphopt.cli import main as graphopt
from graphopt.spec.writing import toml_value
from graphopt.studies.study import Member, Study, installed, members, read_study

NOT_PUBLISHED, NOT_MEASURED = "not published where we could read", "not measured here"
#: fields of a step's forecast, by the figures of studies
STEP = {"memory": ("peak_bytes",), "parameters": ("parameters",), "FLOPs": ("forward_flops", "backward_flops")}


@dataclass(frozen=True)
class Row:
    """One figure of one row of a study, a change against another row if that is a change."""

    study: str
    member: Member
    figure: str
    published: str
    source: str
    against: Member

    @property
    def command(self) -> str:
        """What prints ours."""
        if self.figure in STEP:
            return spec_command("apply", self.member)
        return spec_command("check", self.member) if self.figure == "forward FLOPs" else f"study {self.study.removeprefix('studies/')}"

    def ours(self) -> str:
        """Ours, as a change in percent."""
        if self.figure not in (*STEP, "forward FLOPs"):
            return NOT_MEASURED
        mine, other = (value(self.figure, member) for member in (self.member, self.against))
        return f"{100 * (mine / other - 1):+.1f} %"


def spec_command(name: str, member: Member) -> str:
    """A command about a member's spec."""
    settings = (f"--set {shlex.quote(f'{key}={toml_value(value)}')}" for key, value in member.changes.items())
    return " ".join([name, member.source, *settings])


def value(figure: str, member: Member) -> int:
    """A figure of a step, or of the run: with evaluation and the filling of caches."""
    if figure in STEP:
        return sum(answer(spec_command("apply", member))["after"][field] for field in STEP[figure])
    flops: int = answer(spec_command("check", member))["run"]["forward_flops"]
    return flops


@cache
def answer(command: str) -> Mapping[str, Any]:
    """What a command prints as JSON; `check` prints it too where the data set is not here."""
    out = StringIO()
    with redirect_stdout(out):
        code = graphopt([*shlex.split(command), "--json"])
    try:
        found: Mapping[str, Any] = json.loads(out.getvalue())
    except ValueError:
        raise SystemExit(f"`graphopt {command} --json` ended with {code} and printed no JSON") from None
    return found


def rows(name: str, study: Study, found: list[Member]) -> Iterator[Row]:
    """The published figures of a study, and the same changes of its other rows."""
    first = {member.row: member for member in reversed(found)}
    order = list(dict.fromkeys(member.row for member in found))
    published = {(row, item.figure, item.against): item for item in study.published for row in item.variant}
    yield from (
        Row(name, first[row], figure, item.value, item.source, first[against or first[row].baseline or order[0]])
        for (row, figure, against), item in published.items()
    )
    for figure in dict.fromkeys(item.figure for item in study.published if item.figure in STEP):
        for row in order:
            baseline = first[row].baseline or order[0]
            if row != baseline and (row, figure, None) not in published:
                yield Row(name, first[row], figure, NOT_PUBLISHED, "", first[baseline])


def all_rows() -> list[Row]:
    """The rows of every study that has published figures."""
    studies = ((name, *read_study(name)) for name in installed())
    return [row for name, study, path in studies if study.published for row in rows(name, study, members(study, path))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose study, name or figure has this text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    titles = "| study | row | figure | against | published | ours | source | command |"
    lines = [heading("Published figures beside ours", __doc__), titles, "|---|---|---|---|---|---|---|---|"]
    for row in all_rows():
        if options.only in f"{row.study}: {row.member.row}, {row.figure}":
            against = row.against.row if row.figure not in ("accuracy", "error") else ""
            cells = (row.study, row.member.row, row.figure, against, row.published, row.ours(), row.source, f"`graphopt {row.command}`")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
