"""Renderings as files: each is whole under its name, or not there."""

import json
from pathlib import Path
from typing import Any

from graphopt.diff.render.data import Shown, main_diff
from graphopt.diff.render.explorer import to_model_explorer, to_node_data
from graphopt.diff.render.page import to_html
from graphopt.diff.render.png import to_png
from graphopt.diff.render.svg import to_svg
from graphopt.files import write_atomically


def write_html(shown: Shown, path: Path) -> None:
    """The page; one file, no network."""
    write(path, to_html(shown))


def write_svg(shown: Shown, path: Path, *, width: int = 1200, height: int = 760) -> None:
    """The picture, light, sized for a window of `width` x `height`."""
    write(path, to_svg(shown, width=width, height=height))


def write_png(shown: Shown, path: Path, *, width: int = 1200, height: int = 760) -> None:
    """The same picture with two pixels per unit; needs Chromium or CairoSVG."""
    write_atomically(path, to_png(to_svg(shown, width=width, height=height)))


def write_model_explorer(shown: Shown, path: Path) -> tuple[Path, Path]:
    """The graph, and next to it (`x.json` -> `x.data.json`) the node data that colours it; the two paths."""
    diff = main_diff(shown)
    overlay = path.with_name(f"{path.stem}.data{path.suffix}")
    _write_json(path, to_model_explorer(diff))
    _write_json(overlay, to_node_data(diff))
    return path, overlay


def _write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all.

    Raises:
        RunError: the folder does not exist, or the disk refuses.
    """
    write_atomically(path, text.encode())
