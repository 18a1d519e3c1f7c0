"""What a notebook shows of a plan or a diff."""

import base64
import html

from graphopt.compiler.plan import Plan
from graphopt.diff.align import Diff
from graphopt.diff.render.picture import to_svg
from graphopt.errors import RunError


def picture(shown: Diff | Plan) -> str:
    """HTML of a diff, or of what a plan does in its phase: the SVG picture as an image, so that no style of it reaches the page around.

    Where there is no JavaScript engine to lay it out, the text says what to install.
    """
    found = Diff.of(shown) if isinstance(shown, Plan) else shown
    try:
        data = base64.b64encode(to_svg(found).encode()).decode()
    except RunError as error:
        return f"<pre>{html.escape(repr(shown))}\n{html.escape(str(error))}</pre>"
    return f'<img style="max-width:100%" alt="what the passes change" src="data:image/svg+xml;base64,{data}">'
