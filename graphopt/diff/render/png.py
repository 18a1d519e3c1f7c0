"""A picture as PNG: the SVG drawn by headless Chromium, or by CairoSVG where there is no browser."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from graphopt.errors import RunError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PATIENCE = 60


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
    chromium = browser()
    if chromium is not None:
        return _by_chromium(chromium, svg, scale)
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        raise RunError(
            "a PNG needs Chromium or CairoSVG, and neither is installed",
            fix="Install chromium (or set GRAPHOPT_BROWSER), or `pip install cairosvg`, or take --svg",
        ) from error
    return bytes(cairosvg.svg2png(bytestring=svg.encode(), scale=scale))


def _by_chromium(chromium: str, svg: str, scale: float) -> bytes:
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    width, height = (round(float(v) + 0.49) for v in size.groups()) if size else (1200, 800)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        page, image = Path(folder) / "picture.html", Path(folder) / "picture.png"
        head = '<!doctype html><meta charset="utf-8"><style>html,body{margin:0}svg{display:block}</style>'
        page.write_text(head + svg, encoding="utf-8")
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--force-device-scale-factor={scale:g}",
            f"--window-size={width},{height}",
            f"--screenshot={image}",
            page.as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunError(f"could not draw the PNG: {error}", where=chromium, fix="Take --svg") from error
        if not image.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"could not draw the PNG: {last}", where=chromium, fix="Take --svg")
        return image.read_bytes()
