"""How the status of a row or an operation is shown: one glyph and one colour for each."""

from collections.abc import Iterable
from typing import NamedTuple

from graphopt.compiler.pass_base import Status

#: statuses that no pass gives: as in the backbone, and what the comparison of two backbones adds
KEPT, REMOVED, ADDED, DIFFERS = "kept", "removed", "added", "differs"


class StatusStyle(NamedTuple):
    """How a status is shown everywhere. No two share a glyph, so that colour is never the only sign.

    Attributes:
        glyph: one cell wide. ascii: the same for terminals without Unicode.
        light, dark: colours on a light and a dark ground, after Okabe and Ito (2008): told apart whatever the colour vision.
        terminal: rich's colour.
        meaning: for legends.
    """

    glyph: str
    ascii: str
    light: str
    dark: str
    terminal: str
    meaning: str


#: most important first: where several hold for one row, the first is its main one
STYLES: dict[str, StatusStyle] = {
    REMOVED: StatusStyle("−", "-", "#b04000", "#ff8f4d", "red", "only in the first of the two"),
    ADDED: StatusStyle("⊕", "&", "#0b7fb5", "#7cc8f2", "bright_cyan", "only in the second of the two"),
    DIFFERS: StatusStyle("≠", "!", "#a8467f", "#e79bc6", "magenta", "under the same name in both, but not the same"),
    Status.DROPPED: StatusStyle("✂", "x", "#c04a00", "#f58a4b", "red", "left the training graph; its output is cached"),
    Status.BYPASSED: StatusStyle("↷", ">", "#a86b00", "#f0b43c", "yellow", "replaced by its shortcut"),
    Status.INSERTED: StatusStyle("+", "+", "#1276a8", "#7cc8f2", "bright_cyan", "added by a pass; not in the exported backbone"),
    Status.SHARED: StatusStyle("⇄", "=", "#00795a", "#35c79b", "green", "its weights are computed from its neighbours'"),
    Status.FROZEN: StatusStyle("❄", "*", "#0072b2", "#5cb3ea", "blue", "its parameters do not train"),
    Status.ISOLATED: StatusStyle("⊣", "|", "#a8467f", "#e79bc6", "magenta", "no gradient comes back to its output"),
    Status.CHECKPOINTED: StatusStyle("↻", "@", "#857500", "#e8dc4c", "bright_yellow", "recomputed in the backward pass instead of saved"),
    Status.REWIRED: StatusStyle("~", "~", "#5b5f66", "#b4b9c2", "bright_black", "computes the same with other operators"),
    KEPT: StatusStyle("○", "o", "#7a7f87", "#8d939c", "bright_black", "as in the backbone"),
}

_RANK = {name: rank for rank, name in enumerate(STYLES)}


def ranked(statuses: Iterable[str]) -> tuple[str, ...]:
    """Statuses, most important first; `("kept",)` where there are none."""
    return tuple(sorted({str(s) for s in statuses} - {KEPT}, key=_RANK.__getitem__)) or (KEPT,)
