"""The errors that graphopt raises on purpose. Each says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable
from typing import Any, Self

#: what a terminal or a viewer obeys instead of showing it: control characters but line ends and tabs, and changes of direction
_CONTROL = [*(c for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROL += range(0xD800, 0xE000)  # surrogates: bytes of a file's name that are no UTF-8, which nothing can encode
_VISIBLE = {c: f"\\u{c:04x}" for c in _CONTROL}


def printable(text: str) -> str:
    """A text with its control characters as JSON and TOML write them, so that nothing that prints it is steered by a name."""
    return text.translate(_VISIBLE)


class GraphoptError(Exception):
    """Base class of all errors that graphopt raises on purpose.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: file:line and field, pass, node or module path.
        fix: what the user can do about it, without a full stop at the end.
    """

    #: exit status of the command line: 2 if the user can correct it, 1 if graphopt or the machine has failed
    exit_code = 2
    #: whether another process of the run reports it, so that this one prints nothing
    silent = False

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__  # to be sent to other processes

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text.rstrip('.')}. {self.fix}" if self.fix else text

    def with_location(self, where: str) -> Self:
        """The same error with an outer location (a line of the spec) before its own (a region)."""
        self.where = f"{where}: {self.where}" if self.where else where
        self.args = (self.what, self.where, self.fix)
        return self


def silenced(error: Exception, exit_code: int | None = None) -> GraphoptError:
    """An error that another process reports: it ends this one without a word, with `exit_code` or the error's own status (default 1).

    An error of graphopt's stays the same object; any other becomes a RunError.
    """
    quiet = error if isinstance(error, GraphoptError) else RunError(str(error))
    quiet.silent, quiet.exit_code = True, exit_code if exit_code is not None else getattr(error, "exit_code", 1)
    return quiet


def first_line(error: BaseException) -> str:
    """What an error says, cut after its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SpecError(GraphoptError):
    """A spec is not valid: syntax, an unknown key, a wrong type."""


class BackboneError(GraphoptError):
    """The backbone cannot be built."""


class WeightsError(BackboneError):
    """A weights file cannot be read, or does not fit the backbone."""


class TraceError(GraphoptError):
    """The backbone cannot be traced into one graph."""


class SelectError(GraphoptError):
    """A selector matches nothing."""


class PassError(GraphoptError):
    """A pass cannot be applied as its options say."""


class VerifyError(GraphoptError):
    """A rewrite broke a property that its pass declares."""

    exit_code = 1


class CostError(GraphoptError):
    """A training step cannot be forecast, or a budget makes no sense."""


class NeedsValuesError(CostError):
    """A forecast has no values of tensors, and the backbone's Python asks for one."""


class RunError(GraphoptError):
    """A run, a checkpoint, an output folder or a command-line option is not usable."""


def listed(names: Iterable[str], most: int = 5) -> str:
    """`"a, b and 3 more"`: names for a message, not more than so many."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str | None:
    """`"Did you mean 'a', 'b' or 'c'?"`: the most similar known names, best first, case ignored; None if there is none."""
    by_folded: dict[str, str] = {}
    for item in known:
        by_folded.setdefault(item.casefold(), item)
    folded = name[:200].casefold()  # a longer one is similar to nothing
    hits = difflib.get_close_matches(folded, by_folded, n=count, cutoff=0.5)
    # A name that contains what was typed is similar too, although difflib's score of it is low.
    hits += sorted((other for other in by_folded if folded and folded in other and other not in hits), key=len)
    if not hits:
        return None
    *others, last = (repr(by_folded[hit]) for hit in hits[:count])
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"
