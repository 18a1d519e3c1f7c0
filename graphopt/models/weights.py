"""Weight files: read without running code, checked for damage, loaded strictly."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from graphopt.errors import WeightsError, first_line, listed
from graphopt.hashing import content_digest

_SAVE = "Save model.state_dict(), preferably as safetensors"
_AGAIN = "Copy or export it again"
#: metadata key of safetensors files that graphopt has written: a digest of everything else in them
CHECKSUM = "checksum"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads a file into `module`, strictly, in place.

    Raises:
        WeightsError: with the number and the first few of missing keys, unexpected keys and other shapes; `module` is then unchanged.
    """
    state = read_weights(path)
    own = module.state_dict()
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [f"{key} {tuple(state[key].shape)}, the backbone's is {tuple(own[key].shape)}" for key in other],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what} ({listed(keys)})" for what, keys in problems.items() if keys)
        fix = "Check [backbone] name and arguments (num_classes?)"
        raise WeightsError(f"the weights do not fit the backbone ({len(own)} tensors): {found}", where=str(path), fix=fix)
    module.load_state_dict(state, strict=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A flat state dict on the CPU, from safetensors or a weights-only torch checkpoint.

    In a checkpoint it may be under "model" or "state_dict"; the prefixes that DDP and torch.compile add are removed.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds no state dict. Damage shows in the checksums of an archive that
            `torch.save` wrote, and in that of a safetensors file that graphopt wrote; others have none.
    """
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        fix = "It is looked for in the folder of the spec and in the working directory"
        raise WeightsError("no such weights file", where=str(path), fix=fix)
    try:
        if file.suffix == ".safetensors":
            loaded: Any = read_safetensors(file)[1]
        else:
            _check_archive(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        message = "not a weights-only checkpoint, and graphopt runs no code from one"
        raise WeightsError(message, where=str(path), fix=_SAVE) from error
    except Exception as error:
        message = f"cannot be read as weights: {type(error).__name__}: {first_line(error)}"
        raise WeightsError(message, where=str(path), fix=_SAVE) from error
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in ("state_dict", "model") if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError("holds no state dict", where=str(path), fix=_SAVE)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in loaded):
            loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return dict(loaded)


def _check_archive(file: Path) -> None:
    """Checks the archive's own checksums, which torch does not read."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise WeightsError(f"is damaged in {damaged}", where=str(file), fix=_AGAIN)


def to_safetensors(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file with a checksum in its metadata. Tensors must be contiguous, and share no memory."""
    return save(dict(state), {**metadata, CHECKSUM: _checksum(metadata, state)})


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises WeightsError if its content is not what `to_safetensors` wrote; OSError or SafetensorError if it cannot be read.
    """
    with safe_open(os.fspath(file), "pt") as opened:
        metadata = dict(opened.metadata() or {})
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(metadata, state):
        raise WeightsError("is damaged: its content is not what was written", where=str(file), fix=_AGAIN)
    return metadata, state


def _checksum(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    return content_digest([sorted(metadata.items()), sorted(state.items())])
