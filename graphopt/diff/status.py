"""What can become of a part of a backbone: one word, one glyph, one colour each."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
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


#: in order of weight: where several hold for one row, the first is shown as its main one
STATUSES: dict[str, Look] = {
    "removed": Look("−", "-", "#b04000", "#ff8f4d", "red", "only in the first of the two"),
    "added": Look("⊕", "&", "#0b7fb5", "#7cc8f2", "bright_cyan", "only in the second of the two"),
    "differs": Look("≠", "!", "#a8467f", "#e79bc6", "magenta", "under the same name in both, but not the same"),
    "dropped": Look("✂", "x", "#c04a00", "#f58a4b", "red", "left the training graph; its output features are kept"),
    "bypassed": Look("↷", ">", "#a86b00", "#f0b43c", "yellow", "replaced by its shortcut"),
    "inserted": Look("+", "+", "#1276a8", "#7cc8f2", "bright_cyan", "added by a pass; not in the exported backbone"),
    "shared": Look("⇄", "=", "#00795a", "#35c79b", "green", "its weights are made of its neighbours'"),
    "frozen": Look("❄", "*", "#0072b2", "#5cb3ea", "blue", "its parameters do not train"),
    "isolated": Look("⊣", "|", "#a8467f", "#e79bc6", "magenta", "gradients stop behind it"),
    "checkpointed": Look("↻", "@", "#857500", "#e8dc4c", "bright_yellow", "computed again in the backward instead of saved"),
    "rewired": Look("~", "~", "#5b5f66", "#b4b9c2", "bright_black", "computes the same by other operators"),
    "kept": Look("○", "o", "#7a7f87", "#8d939c", "bright_black", "as in the backbone"),
}

ORDER = {name: rank for rank, name in enumerate(STATUSES)}


def ranked(statuses: set[str] | frozenset[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Statuses by weight, weightiest first; `("kept",)` where there are none."""
    chosen = tuple(sorted(set(statuses) - {"kept"}, key=lambda s: (ORDER.get(s, len(ORDER)), s)))
    return chosen or ("kept",)


def look(status: str) -> Look:
    """The look of a status, unknown ones (a third party's mark) included."""
    return STATUSES.get(status, Look("?", "?", "#5b5f66", "#b4b9c2", "white", status))
