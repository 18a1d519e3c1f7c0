"""The rows of `tools/coverage.py`, the file that holds them between runs, and the table made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from coverage_backbones import not_installed
from machine import heading

CELLS = ("freeze", "behind", "mix", "surrogate", "drop", "bypass", "supervise", "memory", "checkpoint")
#: what makes the run fail
BAD = ("traceback", "not verified", "no forecast", "unequal", "export unequal", "limit", "died", "left out")
ABOUT = """\
ok: compiled, fully verified, and the forecast of a step equals the measured one (saved and peak bytes, FLOPs). no:
refused, the reason is below. `as it is`: the backbone without a pass. freeze: the first half; behind: one part in the
middle, behind trainable ones; mix, surrogate: share every second block; drop: half as a prefix; bypass: all branches for
good; supervise: two modules; memory: cuts by memory; checkpoint: two segments. export: the largest relative difference
of all exports of the row. opaque: modules kept whole, the first one's reason is below. Rows of an earlier run stay where
`--resume` found nothing wrong with them.
"""


@dataclass
class Row:
    """What came of one backbone: a word per column, and for each word that needs it the reason."""

    name: str
    input: str = ""
    words: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    exports: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def put(self, column: str, word: str, reason: str = "") -> Row:
        self.words[column] = word
        if reason:
            self.reasons[column] = reason
        return self

    @property
    def bad(self) -> dict[str, str]:
        """Reasons of the columns that make the run fail."""
        return {column: self.reasons.get(column, "") for column, word in self.words.items() if word in BAD}

    @property
    def good(self) -> bool:
        return not self.bad

    def text(self) -> str:
        worst = max(self.exports, default=None)
        exported = "" if worst is None else "equal" if worst == 0 else f"{worst:.0e}"
        columns = ("traced", "blocks", "opaque", "cuts", "as it is", *CELLS)
        return "| " + " | ".join([self.name, self.input, *(self.words.get(c, "") for c in columns), exported]) + " |"


class Table:
    """All rows: those of the file, and those that are added, which go there, too. The last row of a name counts."""

    def __init__(self, names: Sequence[str], file: Path) -> None:
        self.names, self.file = names, file
        lines = file.read_text().splitlines() if file.exists() else []
        found = (Row(**json.loads(line)) for line in lines)
        self.rows: dict[str, Row] = {row.name: row for row in found if row.name in names}

    def add(self, row: Row) -> None:
        self.rows[row.name] = row
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    @property
    def ordered(self) -> list[Row]:
        return [self.rows[name] for name in self.names if name in self.rows]

    @property
    def good(self) -> bool:
        return all(row.good for row in self.ordered) and len(self.rows) == len(self.names)

    def totals(self) -> str:
        traced = Counter(row.words["traced"] for row in self.ordered)
        counts = Counter(word for row in self.ordered for column, word in row.words.items() if column in (*CELLS, "as it is"))
        cells = ", ".join(f"{n} {word}" for word, n in counts.most_common())
        exports = [e for row in self.ordered for e in row.exports]
        others = "".join(f", {n} {word}" for word, n in traced.items() if word not in ("yes", "no"))
        return (
            f"{len(self.ordered)} of {len(self.names)} backbones: {traced['yes']} traced, {traced['no']} refused with a reason{others}. "
            f"Cells: {cells or 'none'}. Exports: {sum(e == 0 for e in exports)} of {len(exports)} bit-equal, the largest relative "
            f"difference is {max(exports, default=0):.0e}. {sum(row.seconds for row in self.ordered) / 60:.0f} minutes of processor time."
        )

    def text(self, about: str | None) -> str:
        head = ["backbone", "input", "traced", "blocks", "opaque", "cut points", "as it is", *CELLS, "export"]
        notes: dict[str, list[str]] = {}
        for row in self.ordered:
            for column, reason in row.reasons.items():
                word = "kept whole" if column == "opaque" else row.words[column]
                notes.setdefault(f"{word}: {reason}", []).append(f"{row.name} {column}")
        missing = [f"not installed: {', '.join(not_installed())}"] if not_installed() else []
        missing += [name for name in self.names if name not in self.rows]
        return "\n".join(
            [
                heading("Backbones: what traces, what each pass makes of it, forecasts and exports", about, ("transformers", "einops")),
                f"{ABOUT}\n{self.totals()}\n",
                f"Missing: {', '.join(missing) or 'nothing'}.\n",
                "| " + " | ".join(head) + " |",
                "|" + " --- |" * len(head),
                *(row.text() for row in self.ordered),
                "",
                *(f"- {why} ({len(names)}: {', '.join(names)})" for why, names in sorted(notes.items())),
                "",
            ]
        )
