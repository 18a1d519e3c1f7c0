"""The diff as a static SVG: the page's own layout and drawing, run by a JavaScript engine without a browser."""

import json
import shutil
import subprocess

from graphopt.diff.render.data import Shown, page_data
from graphopt.diff.render.page import SCRIPTS
from graphopt.diff.render.style import for_file, web
from graphopt.errors import RunError

#: seconds after which a layout is given up (a picture takes well under one)
PATIENCE = 60


def to_svg(shown: Shown, *, width: int = 1200, height: int = 760, level: str = "folded", metric: str | None = None) -> str:
    """The picture of a diff; of several phases, the one that changes most.

    Args:
        width, height: the window it should fit; it is laid out in as many columns as fit best.
        level: "stages", "folded", "blocks" or "operations". metric: the figure the bars show.

    Raises:
        RunError: there is no JavaScript engine (neither the mini-racer package nor Node).
    """
    data = page_data(shown)
    options = {"width": width, "height": height, "level": level, "metric": metric}
    code = "\n".join(
        [
            *map(web, SCRIPTS),
            f"(() => {{ const data = JSON.parse({json.dumps(json.dumps(data))});",
            f"return graphoptScene.file(data, data.phases[data.show], {json.dumps(options)}); }})()",
        ]
    )
    return _run(code).replace("/*STYLE*/", for_file())


def _run(code: str) -> str:
    """The value of a script: by V8 inside this process, else by Node."""
    try:
        from py_mini_racer import MiniRacer
    except ImportError:
        return _by_node(code)
    engine = MiniRacer()
    try:
        return str(engine.eval(code, timeout_sec=PATIENCE))
    finally:
        engine.close()


def _by_node(code: str) -> str:
    node = shutil.which("node")
    if node is None:
        raise RunError("no JavaScript engine to lay the picture out", fix="Run `pip install mini-racer`, or take --html")
    script = f"process.stdout.write(require('vm').runInThisContext({json.dumps(code)}))"
    done = subprocess.run([node, "-"], input=script, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise RunError(f"the layout failed: {last}", where="node", fix="Run `pip install mini-racer`")
    return done.stdout
