"""The diff as an SVG, by the page's own layout and drawing in a JavaScript engine, and as PNG and PDF, by Chromium or CairoSVG."""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from graphopt.diff.render.data import Shown, page_data
from graphopt.diff.render.page import SCRIPTS, for_file, web
from graphopt.errors import RunError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
#: seconds after which a layout or a drawing is given up (they take well under one)
PATIENCE = 60


def to_svg(shown: Shown, *, width: int = 1200, height: int = 760, level: str = "folded", metric: str | None = None) -> str:
    """The picture of a diff; of several phases, the one that changes most.

    Args:
        width, height: the window it should fit; it is laid out in as many columns as fit best.
        level: "stages", "folded", "blocks" or "operations". metric: the figure the bars show.

    Raises:
        RunError: there is no JavaScript engine (neither the mini-racer package nor Node).
    """
    data, options = page_data(shown), {"width": width, "height": height, "level": level, "metric": metric, "style": for_file()}
    call = f"graphoptScene.file(data, data.phases[data.show], {json.dumps(options)})"
    code = "\n".join([*map(web, SCRIPTS), f"(() => {{ const data = JSON.parse({json.dumps(json.dumps(data))});", f"return {call}; }})()"])
    return _run(code)


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


def browser() -> str | None:
    """Path of a Chromium: the one in GRAPHOPT_BROWSER, else the first on the PATH."""
    named = os.environ.get("GRAPHOPT_BROWSER")
    return named or next((path for name in BROWSERS if (path := shutil.which(name))), None)


def to_png(svg: str, *, scale: float = 2.0) -> bytes:
    """The PNG of a picture.

    Args:
        svg: of `to_svg`. scale: pixels per unit; 2 is sharp in print and on dense screens.

    Raises:
        RunError: there is neither a Chromium nor CairoSVG, or drawing failed.
    """
    if chromium := browser():
        width, height = _size(svg)
        return _by_chromium(chromium, svg, [f"--force-device-scale-factor={scale:g}", f"--window-size={width},{height}"], "screenshot")
    return bytes(_cairo("PNG").svg2png(bytestring=svg.encode(), scale=scale))


def to_pdf(svg: str) -> bytes:
    """The PDF of a picture: one page of its size, text and lines as such; raises as `to_png`.

    Args:
        svg: of `to_svg`.
    """
    if chromium := browser():
        return _by_chromium(chromium, svg, ["--no-pdf-header-footer"], "print-to-pdf")
    return bytes(_cairo("PDF").svg2pdf(bytestring=svg.encode()))


def _cairo(what: str) -> Any:
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        fix = "Install chromium (or set GRAPHOPT_BROWSER), or `pip install cairosvg`, or take --svg"
        raise RunError(f"a {what} needs Chromium or CairoSVG, and neither is installed", fix=fix) from error
    return cairosvg


def _size(svg: str) -> tuple[int, int]:
    """Width and height of a picture in whole pixels that hold it."""
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    return (math.ceil(float(size[1])), math.ceil(float(size[2]))) if size else (1200, 800)


def _by_chromium(chromium: str, svg: str, options: list[str], action: str) -> bytes:
    """What a headless browser makes of a picture by one of its options `--screenshot=FILE` and `--print-to-pdf=FILE`."""
    width, height = _size(svg)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        page, made = Path(folder) / "picture.html", Path(folder) / f"picture.{'png' if action == 'screenshot' else 'pdf'}"
        style = f"@page{{size:{width}px {height}px;margin:0}}html,body{{margin:0}}svg{{display:block}}"
        page.write_text(f'<!doctype html><meta charset="utf-8"><style>{style}</style>{svg}', encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command += [*options, f"--{action}={made}", page.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(f"could not draw the picture: {error}", where=chromium, fix="Take --svg") from error
        if not made.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"could not draw the picture: {last}", where=chromium, fix="Take --svg")
        return made.read_bytes()
