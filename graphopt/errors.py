"""One family of errors: each says where, what, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self


class GraphoptError(Exception):
    """Base of everything graphopt raises on purpose.

    Args:
        what: the fact, in one sentence without a final full stop.
        where: file:line and field, pass, node or module path.
        fix: what the user can do about it.
    """

    #: process exit status of the command line: 2 is the user's to mend, 1 is a failure of ours or of the machine.
    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.fix:
            text = f"{text.rstrip('.')}. {self.fix}"
        return text

    def with_location(self, where: str) -> Self:
        """The same error with an outer location put before its own (a line of the spec before a region)."""
        self.where = f"{where}: {self.where}" if self.where else where
        self.args = (self.what, self.where, self.fix)
        return self


class SpecError(GraphoptError):
    """The spec is not one: syntax, an unknown key, a wrong type."""


class BackboneError(GraphoptError):
    """The backbone cannot be built, or its weights do not fit."""


class TraceError(GraphoptError):
    """The backbone cannot become one graph."""


class SelectError(GraphoptError):
    """A selector names nothing, or something that is not there."""


class PassError(GraphoptError):
    """A pass cannot do what it was asked to."""


class VerifyError(GraphoptError):
    """A rewrite did not keep a property it declared."""

    exit_code = 1


class CostError(GraphoptError):
    """A training step cannot be forecast, or a budget makes no sense."""


class RunError(GraphoptError):
    """Training, a checkpoint or an output folder is not as it must be."""


def near(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` known names nearest to `name`, best first; case is ignored."""
    by_folded: dict[str, str] = {}
    for item in known:
        by_folded.setdefault(item.casefold(), item)
    hits = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.5)
    if len(hits) < count:
        # A path that merely ends or starts with what was typed reads as a near miss although difflib scores it low.
        inside = [folded for folded in by_folded if name and name.casefold() in folded and folded not in hits]
        hits += sorted(inside, key=len)[: count - len(hits)]
    return [by_folded[hit] for hit in hits]


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str | None:
    """`"did you mean 'a', 'b' or 'c'?"`, or None where nothing is near."""
    hits = [repr(hit) for hit in near(name, known, count)]
    if not hits:
        return None
    listed = hits[0] if len(hits) == 1 else f"{', '.join(hits[:-1])} or {hits[-1]}"
    return f"Did you mean {listed}?"
