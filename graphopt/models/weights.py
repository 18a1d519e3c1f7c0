"""Weight files: read without running code, checked for damage, loaded strictly but for what is to start anew."""

import argparse
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.serialization import safe_globals

from graphopt.errors import WeightsError, did_you_mean, first_line, listed
from graphopt.hashing import content_digest
from graphopt.runtime.state_dicts import load_versioned

_SAVE = "Save model.state_dict(), preferably as safetensors"
_AGAIN = "Copy or export it again"
#: metadata key of safetensors files that graphopt has written: a digest of everything else in them
CHECKSUM = "checksum"


def load_weights(module: nn.Module, path: str | Path, *, reset: Sequence[str] = (), entry: str | None = None) -> None:
    """Loads a file into `module`, in place: every tensor of both, but for the modules at the paths `reset`, which stay as they are.

    Weights of another input size, or of an older version of timm, are adapted by the function that timm has for that network.

    Args:
        entry: the key of the state dict in the file, as in `read_weights`.

    Raises:
        WeightsError: with the number and the first few of missing keys, unexpected keys and other shapes, or for a path in `reset` that
            the module does not have; `module` is then unchanged.
    """
    own = module.state_dict()
    whole = _without_wrapper(read_weights(path, entry), own)
    for name in reset:
        if not any(_below(key, name) for key in own):
            fix = did_you_mean(name, [inner for inner, _ in module.named_modules() if inner])
            raise WeightsError(f"the backbone has no module {name!r} with weights to reset", where=str(path), fix=fix)

    def kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if not any(_below(key, name) for name in reset)}

    state, wanted = kept(whole), kept(own)
    if _unlike(state, wanted):
        state = kept(_adapted(module, state, str(path)))
    if problems := _unlike(state, wanted):
        found = "; ".join(f"{len(keys)} {what} ({listed(keys.values())})" for what, keys in problems.items())
        fix = _reset_instead(problems, path, reset) or "Check [backbone] name and arguments (num_classes?)"
        raise WeightsError(f"the weights do not fit the backbone ({len(own)} tensors): {found}", where=str(path), fix=fix)
    load_versioned(module, {**own, **state})


def _without_wrapper(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the names of modules that held the network (a Lightning module's `model.`), which begin no key of the network."""
    while len(first := {key.partition(".")[0] for key in state}) == 1 and all("." in key for key in state):
        (name,) = first
        if any(_below(key, name) for key in own):
            break
        state = {key.removeprefix(f"{name}."): value for key, value in state.items()}
    return state


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")


def _unlike(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """What keeps a state dict from being loaded strictly: by kind, the keys, and each in words."""
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = {
        "missing": {key: key for key in own if key not in state},
        "unexpected": {key: key for key in state if key not in own},
        "of another shape": {key: f"{key} {tuple(state[key].shape)}, the backbone's is {tuple(own[key].shape)}" for key in other},
    }
    problems["complex, the backbone's are not"] = {
        key: key for key in own if key in state and state[key].is_complex() > own[key].is_complex()
    }
    return {what: keys for what, keys in problems.items() if keys}


def _adapted(module: nn.Module, state: dict[str, Tensor], path: str) -> Mapping[str, Tensor]:
    """The state as the library's own function for this kind of network makes it fit: position embeddings resized, old names replaced."""
    home = sys.modules.get(type(module).__module__)
    theirs = getattr(home, "checkpoint_filter_fn", None)  # in the files of timm that define networks
    try:
        if theirs is not None and type(module).__module__.startswith("timm."):
            return cast(Mapping[str, Tensor], theirs(dict(state), module))
        if type(module).__module__ == "torchvision.models.vision_transformer" and "encoder.pos_embedding" in state:
            size: Any = module
            return cast(Mapping[str, Tensor], cast(Any, home).interpolate_embeddings(size.image_size, size.patch_size, OrderedDict(state)))
    except Exception as error:
        what = f"the weights do not fit the backbone, and cannot be adapted: {type(error).__name__}: {first_line(error)}"
        raise WeightsError(what, where=path, fix="Check [backbone] name and arguments") from error
    return state


def _reset_instead(problems: Mapping[str, Mapping[str, str]], path: str | Path, reset: Sequence[str]) -> str | None:
    """What to write where only one or two modules, a head, do not fit."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for keys in problems.values() for key in keys))
    if len(modules) > 2 or not all(modules):
        return None
    names = ", ".join(f'"{name}"' for name in (*reset, *modules))
    return f'To train a new head: weights = {{ file = "{Path(path).name}", reset = [{names}] }}; else check num_classes'


#: where the training scripts of timm and torchvision, and others, put a state dict; averaged weights first, as timm reads them
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_weights(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """A flat state dict on the CPU, from safetensors or a torch checkpoint, of which no code is run.

    In a checkpoint it may be under `entry`, by default under the first of ENTRIES that there is; the prefixes that DDP, averaging and
    torch.compile add are removed.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds no state dict, or none under `entry`. Damage shows in the
            checksums of an archive that `torch.save` wrote, and in that of a safetensors file that graphopt wrote; others have none.
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
            with safe_globals([argparse.Namespace]):  # the options of a training script: an object that holds values, and runs nothing
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        message = "not a weights-only checkpoint, and graphopt runs no code from one"
        raise WeightsError(message, where=str(path), fix=_SAVE) from error
    except Exception as error:
        message = f"cannot be read as weights: {type(error).__name__}: {first_line(error)}"
        raise WeightsError(message, where=str(path), fix=_SAVE) from error
    return _state_in(loaded, str(path), entry)


def _state_in(loaded: Any, path: str, entry: str | None) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    tables = {key: value for key, value in loaded.items() if isinstance(value, Mapping)} if isinstance(loaded, Mapping) else {}
    if entry is not None and entry not in tables:
        fix = did_you_mean(entry, tables) or (f"It has {', '.join(tables)}" if tables else "Leave the entry out")
        raise WeightsError(f"holds no state dict under {entry!r}", where=path, fix=fix)
    found = tables[entry] if entry is not None else next((tables[key] for key in ENTRIES if key in tables), loaded)
    if isinstance(found, Mapping):
        found = {key: value for key, value in found.items() if key != "n_averaged"}  # torch's averages count
    if not isinstance(found, Mapping) or not found or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        other = [key for key in tables if key not in ENTRIES]
        fix = f'Name one of its entries: weights = {{ file = "...", entry = "{other[0]}" }}' if other and entry is None else _SAVE
        raise WeightsError("holds no state dict", where=path, fix=fix)
    unusual = (k for k, v in found.items() if v.layout != torch.strided or v.is_meta or v.is_quantized)
    if (odd := next(unusual, None)) is not None:
        raise WeightsError(f"{odd} is sparse, quantized or without values", where=path, fix=_SAVE)
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)


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
