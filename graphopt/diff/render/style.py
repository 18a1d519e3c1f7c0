"""Colours and style sheets, for a page (light and dark) and for a file (light, without variables, so that any SVG reader shows it)."""

import re
from functools import cache
from importlib.resources import files

from graphopt.diff.status import KEPT, STYLES

#: name -> (light, dark). Contrast of text on its ground is at least 4.5 : 1 in both.
COLOURS = {
    "ground": ("#ffffff", "#14171c"),
    "card": ("#ffffff", "#1e232a"),
    "box": ("#f5f6f8", "#191d23"),
    "ink": ("#1b1f24", "#e8eaee"),
    "muted": ("#5b626c", "#a6aeb9"),
    "line": ("#ccd1d8", "#3a414b"),
    "edge": ("#8d949e", "#6d7580"),
    "live": ("#2f3640", "#c9d0d9"),
    "before": ("#c3c9d2", "#4c545f"),
    "after": ("#0072b2", "#56b4e9"),
    "good": ("#00664b", "#35c79b"),
    "arc": ("#00795a", "#35c79b"),
    "section": ("#f3f7fb", "#18212b"),
    "sectionline": ("#7ba7c7", "#41698a"),
    "sectionink": ("#22597f", "#9ccdf0"),
    "stop": ("#a8467f", "#e79bc6"),
    "features": ("#b04000", "#f58a4b"),
    "onmark": ("#ffffff", "#14171c"),
    "focus": ("#0072b2", "#7cc8f2"),
}


@cache
def web(name: str) -> str:
    """A file of the page, as text."""
    return (files("graphopt.diff.render") / "web" / name).read_text(encoding="utf-8")


def _variables(index: int) -> str:
    return "".join(f"--{name}:{pair[index]};" for name, pair in COLOURS.items())


def _statuses(dark: bool, prefix: str = "") -> str:
    rules = []
    for name, style in STYLES.items():
        colour = style.dark if dark else style.light
        at = f"{prefix}.s-{name}"
        rules.append(f"{at} .flag,{at} .glyph,{at} .status,{at} .sign{{fill:{colour}}}")
        rules.append(f"{at} .tint{{color:{colour}}}{at}.ink{{background:{colour}}}")
        if name != KEPT:
            rules.append(f".graphopt {at}.op rect{{stroke:{colour};stroke-width:2}}")
    return "".join(rules)


def for_page(*sheets: str) -> str:
    """The style of a page: variables for light and dark (the system's choice, or the button's), then the sheets."""
    dark = f"{_variables(1)}color-scheme:dark;"
    unless = ":root:not([data-theme=light])"
    return "\n".join(
        [
            f":root{{{_variables(0)}color-scheme:light;}}",
            f"@media (prefers-color-scheme: dark){{{unless}{{{dark}}}}}",
            f":root[data-theme=dark]{{{dark}}}",
            _statuses(False),
            f"@media (prefers-color-scheme: dark){{{_statuses(True, f'{unless} ')}}}",
            _statuses(True, ":root[data-theme=dark] "),
            *map(web, sheets),
        ]
    )


def for_file() -> str:
    """The style of an SVG file: light colours, written out."""
    light = {name: pair[0] for name, pair in COLOURS.items()}
    sheet = re.sub(r"var\(--(\w+)\)", lambda m: light[m[1]], web("picture.css"))
    return re.sub(r"\s*\n\s*", "", _drop_html(_statuses(False)) + sheet)


def _drop_html(rules: str) -> str:
    return re.sub(r"[^{}]*(?:\.tint|\.ink)\{[^}]*\}", "", rules)
