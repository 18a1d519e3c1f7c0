"""What a run has trained: the ordinary checkpoint (the backbone's own keys, in safetensors), the plan, or the model."""

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graphopt.compiler.plan import Plan
from graphopt.errors import PassError, RunError
from graphopt.models.weights import to_safetensors
from graphopt.plan_file import TORCH, packed, read_plan_file, restore, write_model
from graphopt.train.checkpoint import load_checkpoint, load_whole
from graphopt.train.folder import RunFolder, read_manifest

StrPath = str | os.PathLike[str]
Which = Literal["best", "last"]
Weights = Literal["auto", "model", "ema"]


def export_run(
    run: StrPath, path: StrPath, *, which: Which = "best", weights: Weights = "auto", plan: Plan | None = None, trust: bool = False
) -> Path:
    """Writes the trained backbone to `path`, atomically; it loads strictly into the untouched backbone.

    The file is safetensors, or for a name in .pt or .pth what `torch.load` reads (weights only, without metadata).

    Its metadata has the spec's `name` and `digest`, the finished `epochs`, which `weights` they are, and a `checksum` of all, which
    graphopt checks wherever it reads the file. Where a pass replaced something that the backbone's architecture cannot express, the file
    holds the emitted module's weights with the spec instead: `graphopt.load(path)` gives the model back. Raises RunError for no run or
    checkpoint, no averaged weights, or no room.

    Args:
        run: the run's folder, or one of its checkpoints.
        which: the checkpoint with the highest accuracy, or the last; `best` takes the last where there is no best.
            Where it is lost or damaged, the newest whole one is used, with a warning.
        weights: "model", "ema" (the averaged weights), or "auto": whichever were better when they were evaluated.
        plan: for a run of a plan compiled by hand, that plan.
        trust: let the run's spec run Python code that it names.
    """
    plan, found = _restored(Path(run), which, weights, plan, trust)
    metadata = {"format": "pt", "name": plan.name, "digest": plan.digest, **found}
    try:
        tensors = {name: tensor.contiguous() for name, tensor in plan.export_state().items()}
        if Path(path).suffix.lower() in TORCH:
            torch.save(tensors, buffer := BytesIO())
            content = buffer.getvalue()
        else:
            content = to_safetensors(tensors, metadata)
    except PassError as error:
        content = packed(plan, {**metadata, "why": str(error)})
    return write_model(Path(path), content)


def load_run(
    run: StrPath,
    *,
    which: Which = "best",
    epoch: int | None = None,
    weights: Weights = "auto",
    plan: Plan | None = None,
    trust: bool = False,
) -> Plan:
    """The plan of a run, in the phase and with the weights of its checkpoint; takes and raises what `export_run` does.

    `epoch`, from 0, asks for the checkpoint at the end of that one. Raises RunError if it was not kept.
    """
    path = Path(run)
    return _restored(path if epoch is None else _at_end_of(path, epoch), which, weights, plan, trust)[0]


def load(path: StrPath, *, trust: bool = False, plan: Plan | None = None) -> nn.Module:
    """The model in a file that `graphopt.save` or `graphopt export` wrote, or in a run's folder; in eval mode.

    `trust` lets its spec run Python code that it names; a file or run of a plan compiled by hand needs that `plan` (in any phase).
    Raises RunError if there is nothing, or not such a file.
    """
    source = Path(path)
    read = load_run if source.is_dir() or source.suffix == ".pt" else read_plan_file
    return read(source, plan=plan, trust=trust).module.eval()


def _restored(run: Path, which: Which, weights: Weights, plan: Plan | None, trust: bool) -> tuple[Plan, dict[str, str]]:
    """The plan of a checkpoint, and what the metadata of its export say: finished epochs, and which weights."""
    state = _state(run, which)
    if weights == "ema" and state["phase"]["ema"] is None:
        raise RunError("the run has no averaged weights", where=str(run), fix="Set train.ema, or export the model's own")
    chosen = state["progress"]["weights"] if weights == "auto" else weights
    found = {"epochs": str(state["progress"]["epoch"]), "weights": chosen}
    return restore(state, state["phase"][chosen], plan=plan, trust=trust, where=str(run)), found


def _at_end_of(run: Path, epoch: int) -> Path:
    """The checkpoint that was written at the end of an epoch."""
    folder, kept, damaged = RunFolder(_existing(run)), set(), []
    for path in folder.checkpoints():
        try:
            progress = load_checkpoint(path)["progress"]
        except RunError:
            damaged.append(path.name)
            continue
        if not progress["step"]:
            kept.add(progress["epoch"] - 1)
            if progress["epoch"] == epoch + 1:
                return path
    has = f"There are those of epoch {', '.join(map(str, sorted(kept)))}; train.keep keeps more" if kept else "The run has none yet"
    also = f"; damaged: {', '.join(damaged)}" if damaged else ""
    raise RunError(f"the run keeps no checkpoint of the end of epoch {epoch}", where=str(run), fix=has + also)


def _existing(run: Path) -> Path:
    if not run.is_dir():
        raise RunError("there is no such run", where=str(run))
    return run


def _state(run: Path, which: Which) -> dict[str, Any]:
    """The content of a checkpoint; of a run's folder, with a warning where another one has to be used in place of the one asked for."""
    if run.is_file():
        return load_checkpoint(run)
    folder = RunFolder(_existing(run))
    if not folder.checkpoints():
        raise RunError("the run has no checkpoint yet", where=str(run), fix="Train it first, or continue it with --resume")
    manifest = read_manifest(run)
    path = folder.best if which == "best" and folder.best.exists() else folder.last
    _, state, message = load_whole(folder, path, manifest["digest"] if manifest is not None else None)
    if message:
        warnings.warn(message, stacklevel=4)
    return state
