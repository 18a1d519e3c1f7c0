"""Pictures as files: each is whole under its name, or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graphopt.diff.join import Diff
from graphopt.diff.phases import Frame
from graphopt.diff.render.data import as_frames, most_changed
from graphopt.diff.render.explorer import to_model_explorer, to_node_data
from graphopt.diff.render.page import to_html
from graphopt.diff.render.png import to_png
from graphopt.diff.render.svg import to_svg
from graphopt.errors import RunError

Shown = Diff | Sequence[Frame]


def write_html(shown: Shown, path: Path) -> None:
    """The page; one file, no network."""
    write(path, to_html(shown))


def write_svg(shown: Shown, path: Path, *, width: int = 1200, height: int = 760) -> None:
    """The picture, light, sized for a window of `width` x `height`."""
    write(path, to_svg(shown, width=width, height=height))


def write_png(shown: Shown, path: Path, *, width: int = 1200, height: int = 760) -> None:
    """The same picture with two pixels per unit; needs Chromium or CairoSVG."""
    write(path, to_png(to_svg(shown, width=width, height=height)))


def write_model_explorer(shown: Shown, path: Path) -> tuple[Path, Path]:
    """The graph, and beside it (`x.json` -> `x.data.json`) the node data that colours it; the two paths."""
    diff = main_diff(shown)
    overlay = path.with_name(f"{path.stem}.data{path.suffix}")
    write(path, json.dumps(to_model_explorer(diff), indent=1, ensure_ascii=False) + "\n")
    write(overlay, json.dumps(to_node_data(diff), indent=1, ensure_ascii=False) + "\n")
    return path, overlay


def main_diff(shown: Shown) -> Diff:
    """The one diff; of a film, the phase that changes most."""
    frames = as_frames(shown)
    return frames[most_changed(frames)].diff


def write(path: Path, content: str | bytes) -> None:
    """Raises:
    RunError: the folder is not there, or the disk refuses; nothing half-written is left.
    """
    data = content.encode() if isinstance(content, str) else content
    partial: str | None = None
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="Name a file in a folder that exists") from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
