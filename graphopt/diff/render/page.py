"""The diff as one self-contained HTML file: no network, no other files."""

import html
import re
from collections.abc import Mapping

from graphopt.diff.render.data import Shown, as_script, page_data
from graphopt.diff.render.style import for_page, web

#: layout library, then ours in the order they build on each other
SCRIPTS = ("vendor/dagre.min.js", "layout.js", "scene.js")


def to_html(shown: Shown) -> str:
    """The page of one diff, or of several phases."""
    data = page_data(shown)
    return filled(
        web("page.html"),
        {
            "TITLE": html.escape(data["title"]),
            "STYLE": for_page("picture.css", "page.css"),
            "DATA": as_script(data),
            "SCRIPTS": scripts(*SCRIPTS, "app.js"),
        },
    )


def filled(template: str, values: Mapping[str, str]) -> str:
    """`%%NAME%%` replaced, in one go: a value that looks like a placeholder stays what it is."""
    return re.sub(r"%%(\w+)%%", lambda m: values[m[1]], template)


def scripts(*names: str) -> str:
    """Script elements, with the licence of those from others."""
    return "\n".join(f"<script>{_licence(name)}{_bare(web(name))}</script>" for name in names)


def _bare(code: str) -> str:
    return re.sub(r"(?m)^//# sourceMappingURL=.*$", "", code).replace("</script", "<\\/script")


def _licence(name: str) -> str:
    if not name.startswith("vendor/"):
        return ""
    text = web(f"vendor/{name.split('/')[1].split('.')[0]}.LICENSE").strip().replace("*/", "* /")
    return f"/*! {name.split('/')[1]}\n{text}\n*/\n"
