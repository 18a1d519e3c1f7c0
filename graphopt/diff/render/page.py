"""The diff as one self-contained HTML file (no network, no other files), and the styles that it shares with the SVG file."""

import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from graphopt.diff.model import STYLES, UNCHANGED
from graphopt.diff.render.data import Shown, as_script, page_data
from graphopt.errors import printable

#: layout library, then ours in the order they build on each other
SCRIPTS = ("vendor/dagre.min.js", "layers.js", "layout.js", "scene.js")


def to_html(shown: Shown) -> str:
    """The page of one diff, or of several phases."""
    data = {**page_data(shown), "style": for_file()}
    values = {
        "TITLE": escaped(data["title"]),
        "STYLE": for_page("picture.css", "page.css"),
        "DATA": as_script(data),
    }
    return filled(web("page.html"), {**values, "SCRIPTS": scripts(*SCRIPTS, "app.js")})


def escaped(text: str) -> str:
    """A text that HTML shows as it is."""
    return html.escape(printable(text))


def filled(template: str, values: Mapping[str, str]) -> str:
    """`%%NAME%%` replaced, in one go: a value that looks like a placeholder stays what it is."""
    return re.sub(r"%%(\w+)%%", lambda m: values[m[1]], template)


def scripts(*names: str) -> str:
    """Script elements, with the licence of those from others."""
    return "\n".join(f"<script>{_licence(name)}{_embeddable(web(name))}</script>" for name in names)


def _embeddable(code: str) -> str:
    return re.sub(r"(?m)^//# sourceMappingURL=.*$", "", code).replace("</script", "<\\/script")


def _licence(name: str) -> str:
    if not name.startswith("vendor/"):
        return ""
    text = web(f"{name.split('.')[0]}.LICENSE").strip().replace("*/", "* /")
    return f"/*! {name.removeprefix('vendor/')}\n{text}\n*/\n"


@cache
def web(name: str) -> str:
    """A file of the page, as text."""
    return (files("graphopt.diff.render") / "web" / name).read_text(encoding="utf-8")


def colours(dark: bool) -> dict[str, str]:
    """Name -> colour. Contrast of text on its ground is at least 4.5 : 1."""
    return {name: pair[dark] for name, pair in json.loads(web("colours.json")).items()}


def _variables(dark: bool) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours(dark).items())


def _statuses(dark: bool, prefix: str = "", html: bool = True) -> str:
    rules = []
    for name, style in STYLES.items():
        colour = style.dark if dark else style.light
        at = f"{prefix}.s-{name}"
        rules.append(f"{at} .flag,{at} .glyph,{at} .status,{at}.op > .sign{{fill:{colour}}}")
        if html:
            rules.append(f"{at} .tint{{color:{colour}}}{at}.ink{{background:{colour}}}")
        if name != UNCHANGED:
            rules.append(f".graphopt {at}.op rect{{stroke:{colour};stroke-width:2}}")
    return "".join(rules)


def for_page(*sheets: str) -> str:
    """The style of a page: variables for light and dark (the system's choice, or the button's), then the sheets."""
    dark = f"{_variables(True)}color-scheme:dark;"
    system, unless = "@media (prefers-color-scheme: dark)", ":root:not([data-theme=light])"
    rules = [f":root{{{_variables(False)}color-scheme:light;}}", f"{system}{{{unless}{{{dark}}}}}", f":root[data-theme=dark]{{{dark}}}"]
    rules += [_statuses(False), f"{system}{{{_statuses(True, f'{unless} ')}}}", _statuses(True, ":root[data-theme=dark] ")]
    return "\n".join([*rules, *map(web, sheets)])


def for_file() -> str:
    """The style of an SVG file: light, and without variables, so that any SVG reader shows it."""
    sheet = re.sub(r"var\(--(\w+)\)", lambda m: colours(dark=False)[m[1]], web("picture.css"))
    return re.sub(r"\s*\n\s*", "", _statuses(False, html=False) + sheet)
