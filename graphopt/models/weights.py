"""Weight files: read without running code, and loaded strictly."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import BackboneError

_SAVE = "Save model.state_dict(), best as safetensors"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a file into `module`, strictly, in place.

    Raises:
        BackboneError: with the counts and the first few of missing and unexpected keys and wrong shapes; `module` is
            then unchanged.
    """
    state = read_weights(path)
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)}, the backbone's is {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    told = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", shapes),
    ]
    if any(told):
        raise BackboneError(
            f"the weights do not fit the backbone ({len(own)} tensors): {'; '.join(text for text in told if text)}",
            where=str(path),
            fix="Check [backbone] name and arguments (num_classes?)",
        )
    module.load_state_dict(state, strict=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A flat state dict on the CPU from safetensors or a weights-only torch checkpoint.

    A checkpoint may nest it under "model" or "state_dict"; the prefixes that DDP and torch.compile add are taken off.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        fix = "It is looked for beside the spec and in the working directory"
        raise BackboneError("no such weights file", where=str(path), fix=fix)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "not a weights-only checkpoint, and graphopt runs no code from one"
        raise BackboneError(what, where=str(path), fix=_SAVE) from error
    except Exception as error:
        what = f"cannot be read as weights: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise BackboneError(what, where=str(path), fix=_SAVE) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BackboneError("holds no state dict", where=str(path), fix=_SAVE)
    state = dict(loaded)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _listed(what: str, items: Iterable[str], most: int = 5) -> str:
    listed = list(items)
    if not listed:
        return ""
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return f"{len(listed)} {what} ({', '.join(listed[:most])}{more})"
