"""The head of a committed table: what it is, how to make it again, when, on what, with which versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU: {processor()}, {os.cpu_count()} cores"


def heading(title: str, about: str | None, libraries: Sequence[str] = ()) -> str:
    """Markdown: title, the tool's own description, the command, date, device and versions (of `libraries`, too, where installed)."""
    found = [name for name in libraries if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "timm", *found))
    command = shlex.join(["python", *sys.argv])
    first = (about or "").strip().split("\n\n")[0].replace("\n", " ")
    return f"# {title}\n\n{first}\n\n`{command}` on {datetime.date.today()}, {device()}; Python {platform.python_version()}, {versions}.\n"
