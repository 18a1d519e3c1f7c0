"""A plan in one file, and back: for models that the backbone's architecture cannot express, and for going on elsewhere.

The file is safetensors: the emitted module's state dict, with the spec and the decisions in its metadata. Nothing is pickled; loading
replays the passes and then loads by name, strictly. What the backbone can express is better exported (`plan.export()`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.driver import build_backbone, compile
from graphopt.errors import RunError
from graphopt.files import write_atomically
from graphopt.spec import dumps, loads

#: metadata key that tells such a file from an ordinary checkpoint
MARK = "graphopt-plan"


FORMAT = "1"


def packed(plan: Plan, metadata: dict[str, str] | None = None) -> bytes:
    """The content of a plan's file: safetensors, every tensor of `plan.module` under its own name."""
    about = {
        **(metadata or {}),
        "format": "pt",
        MARK: FORMAT,
        "name": plan.name,
        "digest": plan.digest,
        "decisions": json.dumps([d.model_dump(mode="json") for d in plan.decisions]),
        "spec": dumps(plan.spec) if plan.spec is not None else "",
    }
    # Clones: two names of one tensor would be refused.
    return pack({k: v.detach().cpu().contiguous().clone() for k, v in plan.module.state_dict().items()}, about)


def save(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Writes a plan's weights with its spec and decisions to `path`, atomically. `load` gives the model back.

    Raises:
        RunError: there is no room, or no such folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise RunError("there is no such folder", where=str(target.parent), fix="Make it, or choose another")
    write_atomically(target, packed(plan))
    return target


def is_plan_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a whole plan, and not a backbone's checkpoint."""
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return MARK in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_plan_file(source: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safe_open(os.fspath(source), "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise RunError("there is no such file", where=str(source)) from error
    except (SafetensorError, OSError) as error:
        raise RunError(f"is damaged or no safetensors file: {error}", where=str(source)) from error
    if about.get(MARK) != FORMAT:
        raise RunError(
            "is a checkpoint of a backbone, not of a plan",
            where=str(source),
            fix="Load it into the backbone itself: model.load_state_dict(safetensors.torch.load_file(path))",
        )
    return about, state


def rebuilt(text: str, decisions: list[Decision], trust: bool) -> Plan:
    """The plan that a spec's text and the decisions of its run give, without weights."""
    spec = loads(text, trust=trust)
    model = build_backbone(spec.backbone, trust=trust, weights=False)
    return compile(model, spec, decisions=decisions, verify="off", costs=False, trust=trust)
