"""A diff as boxes and arrows, for the languages that lay them out themselves."""

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple

from graphopt.compiler.pass_base import Status
from graphopt.diff.align import Diff, RowGroup
from graphopt.diff.render.words import facts, glyphs, groups, status_words
from graphopt.diff.status import REMOVED

#: statuses whose boxes are dashed: what no longer takes part in training
DASHED = (Status.DROPPED, Status.BYPASSED, REMOVED)


class Arrow(NamedTuple):
    """From one box to another: activations, with or without gradients; what was there before, or is read aside; or weights."""

    source: str
    target: str
    kind: Literal["flow", "no gradient", "dashed", "weights"]


class Flowchart:
    """Boxes by stage, and the arrows between them.

    Attributes:
        stages: names, with the groups of rows in them. key: row name -> identifier of its box.
    """

    def __init__(self, diff: Diff, *, unfold: bool) -> None:
        shown = groups(diff, unfold=unfold)
        self.diff = diff
        self.stages = [(stage, list(members)) for stage, members in groupby(shown, key=lambda g: g.rows[0].stage)]
        self.key = {row.name: f"n{number}" for number, group in enumerate(shown) for row in group.rows}

    def arrows(self) -> Iterator[Arrow]:
        """Each once, those of activations first."""
        stops = set(self.diff.after.gradient_stops)
        attached = {(r.attached_to, r.name) for r in self.diff.rows}
        seen = set()
        for a, b, when in self.diff.edges:
            ends = self.key[a], self.key[b]
            if ends[0] != ends[1] and ends not in seen:
                seen.add(ends)
                yield Arrow(*ends, "no gradient" if (a, b) in stops else "dashed" if when == "before" or (a, b) in attached else "flow")
        for row in self.diff.rows:
            for source in row.sources:
                if source in self.key and self.key[source] != self.key[row.name]:
                    yield Arrow(self.key[source], self.key[row.name], "weights")


def label(group: RowGroup) -> list[str]:
    """The lines of a box below the group's name."""
    row = group.rows[0]
    status = "" if row.plain else f"{glyphs(row.statuses[:1])} {status_words(row)}"
    return [line for line in (row.kind, status, facts(row)) if line]
