"""Plans and diffs as pictures in notebooks, after `%load_ext graphopt`."""

import base64
import html
from typing import Any

from graphopt.compiler.plan import Plan
from graphopt.diff import diff
from graphopt.diff.align import Diff
from graphopt.diff.render.picture import to_svg
from graphopt.errors import RunError


def picture(shown: Diff | Plan) -> str:
    """HTML of a diff, or of what a plan does in its phase; an image, so that no style of it reaches the notebook."""
    found = diff(shown) if isinstance(shown, Plan) else shown
    try:
        data = base64.b64encode(to_svg(found).encode()).decode()
    except RunError as error:  # no engine to draw with
        return f"<pre>{html.escape(f'{shown!r}'[:200])}\n{html.escape(str(error))}</pre>"
    return f'<img style="max-width:100%" alt="what the passes change" src="data:image/svg+xml;base64,{data}">'


def register(shell: Any) -> None:
    """Tells a notebook (IPython's shell) to show plans and diffs so."""
    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type(Plan, picture)
    formatter.for_type(Diff, picture)
