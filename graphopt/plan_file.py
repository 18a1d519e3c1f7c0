"""A plan in one file: for models that the backbone's architecture cannot express, and for continuing elsewhere.

The file is safetensors: the emitted module's state dict, with the spec, the decisions and a checksum in its metadata. Nothing is pickled;
loading replays the passes and then loads the weights by name, strictly. What the backbone can express is better exported
(`plan.export()`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision
from graphopt.driver import build_backbone, compile
from graphopt.errors import RunError, WeightsError
from graphopt.files import read_json, write_atomically
from graphopt.models.weights import read_safetensors, to_safetensors
from graphopt.spec import dumps, loads

#: metadata key that only plan files have; its value is the version of the format
FORMAT_KEY = "graphopt-plan"
FORMAT_VERSION = "2"

#: names of files that torch.load reads
TORCH = (".pt", ".pth")


def packed(plan: Plan, metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a plan's file: safetensors, every tensor of `plan.module` under its own name."""
    about = {
        **(metadata or {}),
        "format": "pt",
        FORMAT_KEY: FORMAT_VERSION,
        "name": plan.name,
        "digest": plan.digest,
        "decisions": json.dumps([d.model_dump(mode="json") for d in plan.decisions]),
        "spec": dumps(plan.spec) if plan.spec is not None else "",
    }
    # Clones, because safetensors refuses two names of one tensor.
    return to_safetensors({k: v.detach().cpu().contiguous().clone() for k, v in plan.module.state_dict().items()}, about)


def save(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Writes a plan's weights with its spec and decisions to `path`, atomically; `load` gives the model back. Raises as `write_model`."""
    return write_model(Path(path), packed(plan))


def write_model(target: Path, content: bytes) -> Path:
    """Writes a model file atomically. Raises RunError if there is no room or no such folder, or if `target` is no name for such a file."""
    if not target.parent.is_dir():
        raise RunError("there is no such folder", where=str(target.parent), fix="Make it, or choose another")
    if target.is_dir():
        raise RunError("is a folder", where=str(target), fix="Name a file, model.safetensors for example")
    kind = target.suffix.lower()
    if (kind in TORCH) != content.startswith(b"PK") or kind not in ("", ".safetensors", *TORCH):
        raise RunError(
            "the file would not be what its name says", where=str(target), fix=f"Name it {target.with_suffix('.safetensors').name}"
        )
    write_atomically(target, content)
    return target


def is_plan_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds a plan, rather than a checkpoint of a backbone."""
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return FORMAT_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_plan_file(path: Path, *, trust: bool = False, plan: Plan | None = None) -> Plan:
    """The plan in a file that `save` wrote, with its weights; takes and raises what `restore` does, and RunError for a damaged file."""
    try:
        about, state = read_safetensors(path)
    except WeightsError as error:
        raise RunError(error.what, where=error.where, fix=error.fix) from error
    except FileNotFoundError as error:
        raise RunError("there is no such file", where=str(path)) from error
    except (SafetensorError, OSError) as error:
        raise RunError(f"is damaged or no safetensors file: {error}", where=str(path)) from error
    if FORMAT_KEY not in about:
        fix = "Load it into the backbone itself: model.load_state_dict(safetensors.torch.load_file(path))"
        raise RunError("is a checkpoint of a backbone, not of a plan", where=str(path), fix=fix)
    check_version(about[FORMAT_KEY], FORMAT_VERSION, str(path))
    try:
        decisions = [Decision.model_validate(d).model_dump(mode="json") for d in read_json(about["decisions"])]
        known = {"digest": about["digest"], "spec": about["spec"], "decisions": decisions}
    except (KeyError, TypeError, ValueError) as error:  # of pydantic, too
        raise RunError("is damaged: it does not say which plan it holds", where=str(path)) from error
    return restore(known, state, plan=plan, trust=trust, where=str(path))


def restore(about: Mapping[str, Any], state: Mapping[str, Tensor], *, plan: Plan | None, trust: bool, where: str) -> Plan:
    """A plan from what a file says about it, with its weights. Raises RunError if `plan` is another plan or missing, or weights do not fit.

    Args:
        about: the text of its "spec" (empty for a plan compiled by hand), its "digest", and its "decisions" as plain values.
        state: state dict of the emitted module. plan: for a plan compiled by hand, that plan (in any phase).
        trust: let the spec run Python code that it names.
    """
    decisions = [Decision.model_validate(d) for d in about["decisions"]]
    if plan is not None:
        check_digest(about["digest"], plan.digest, where, fix="Give the plan that was saved")
        plan = plan.advance_to(decisions, verify="off")
    elif not about["spec"]:
        raise RunError("it holds a plan that was compiled by hand, without a spec", where=where, fix="Give that plan: plan=plan")
    else:
        spec = loads(str(about["spec"]), trust=trust)
        model = build_backbone(spec.backbone, trust=trust, weights=False)
        plan = compile(model, spec, decisions=decisions, verify="off", costs=False, trust=trust)
    load_strictly(plan.module, state)
    return plan


def check_version(found: object, expected: object, where: str) -> None:
    """Raises RunError unless a file's format is the one that this version of graphopt reads and writes."""
    if found != expected:
        what = f"has format {found!r}, this version of graphopt reads format {expected!r}"
        raise RunError(what, where=where, fix="Use the version of graphopt that wrote it")


def check_digest(found: str, expected: str, where: str, fix: str) -> None:
    """Raises RunError unless a checkpoint's digest is the spec's."""
    if found != expected:
        raise RunError(f"it was made with another spec (digest {found[:12]}, yours is {expected[:12]})", where=where, fix=fix)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict; raises RunError unless its names and shapes are the module's."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        what = f"the checkpoint does not fit the network that its spec and decisions give: {', '.join(wrong[:5])}"
        raise RunError(what, fix="It was written with another version of a pass or of the backbone's library")
    module.load_state_dict(dict(state), strict=True)
