"""The sharded tensors of a checkpoint, in parts: every rank writes its own, with torch.distributed.checkpoint.

The parts are safetensors files in a folder `parts/step-00000042` of the run. The checkpoint itself (`last.pt` and the others) holds all
else, the folder's name and the digest of each file, and is written last: parts without it are what an interrupted save has left.
"""

import hashlib
import re
import shutil
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import RunError, listed
from graphopt.files import reason, remove_if_empty, sync_file, sync_folder
from graphopt.runtime.shards import is_sharded
from graphopt.train.ranks import NOTICE, Ranks

FOLDER = "parts"
_NAME = re.compile(r"step-\d{8}(-\d+)?")
_ROOM = "Make room; the checkpoint before it is whole"
_SHARED = 'Let all ranks share the folder, or use checkpoint_format = "whole"'


def _library() -> Any:
    """torch.distributed.checkpoint, which takes a while to load, and does not declare all of its names."""
    from torch.distributed import checkpoint

    return checkpoint


def split(state: Any) -> tuple[Any, dict[tuple[str, ...], Tensor]]:
    """Nested state dicts with None in the place of every sharded tensor, and these by their keys, from the outermost on."""
    if is_sharded(state):
        return None, {(): state}
    if not isinstance(state, Mapping):
        return state, {}
    found = {name: split(value) for name, value in state.items()}
    tensors = {(name, *keys): tensor for name, (_, parts) in found.items() for keys, tensor in parts.items()}
    return {name: rest for name, (rest, _) in found.items()}, tensors


def write(run: Path, step: int, tensors: Mapping[tuple[str, ...], Tensor], ranks: Ranks) -> dict[str, Any] | None:
    """Writes each rank's parts into a new folder of the run; all ranks have to call it, with the same keys.

    Returns what `read` needs, on every rank; None where there is nothing to write. Raises RunError on every rank if one could not write,
    or does not write where rank 0 reads.
    """
    if not tensors:
        return None
    library = _library()
    name = ranks.broadcast(_free_name(run / FOLDER, step) if ranks.first else None)
    folder = run / FOLDER / name
    try:
        try:
            writer = library.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            library.save({"/".join(keys): tensor for keys, tensor in tensors.items()}, storage_writer=writer, process_group=ranks.group)
        except library.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise RunError(f"the part of rank {rank} could not be written: {reason(cause)}", where=str(folder), fix=_ROOM) from cause
        files = _digests(folder, ranks)
    except RunError:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"folder": name, "ranks": ranks.count, "files": files, "tensors": [list(keys) for keys in tensors]}


def _free_name(root: Path, step: int) -> str:
    """A folder that does not exist: a run that goes on from before this step must not write into the parts of another checkpoint."""
    names = (f"step-{step:08d}{suffix}" for suffix in chain([""], (f"-{number}" for number in count(2))))
    return next(name for name in names if not (root / name).exists())


def _digests(folder: Path, ranks: Ranks) -> dict[str, str]:
    """The digest of every rank's file, which is on disk then."""
    own, why = {}, ""
    try:
        for path in folder.glob(f"shard-{ranks.number + 1:05d}-*"):
            sync_file(path)
            own[path.name] = file_digest(path)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        why = reason(error)
    told = ranks.gather((own, why))
    for rank, (_, failed) in enumerate(told):
        if failed:
            raise RunError(f"the part of rank {rank} could not be written: {failed}", where=str(folder), fix=_ROOM)
    files = {name: digest for found, _ in told for name, digest in found.items()}
    missing = ranks.broadcast(_missing(folder, files, NOTICE) if ranks.first else None)
    if missing:
        what = f"rank 0 does not see the parts that other ranks have written ({listed(missing)})"
        raise RunError(what, where=str(folder), fix=_SHARED)
    return files


def _missing(folder: Path, names: Collection[str], patience: float = 0.0) -> list[str]:
    """The files that are not there; network file systems may show them a few seconds late."""
    end = time.monotonic() + patience
    while (missing := [name for name in names if not (folder / name).is_file()]) and time.monotonic() < end:
        time.sleep(0.1)
    return missing


def file_digest(path: Path) -> str:
    """32 hex digits for the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read(state: dict[str, Any], run: Path, record: Mapping[str, Any], fix: str) -> None:
    """Puts the tensors that `split` has taken out of `state` back, whole, on the CPU; one process, whatever ranks wrote them.

    Raises RunError, which names the file, if a part is missing, damaged or one too many; `fix` is its advice.
    """
    library = _library()
    folder, files = run / FOLDER / record["folder"], record["files"]
    if missing := _missing(folder, files):
        what = f"{len(missing)} of the {len(files)} parts that {record['ranks']} ranks wrote are missing: {listed(missing)}"
        raise RunError(what, where=str(folder), fix=fix)
    if more := sorted({path.name for path in folder.glob("*.safetensors")} - files.keys()):
        raise RunError(f"files that are no parts of the checkpoint: {listed(more)}", where=str(folder), fix="Remove them")
    for name, digest in files.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            raise RunError(f"cannot be read: {reason(error)}", where=str(folder / name), fix=fix) from error
        if found != digest:
            raise RunError("is damaged: its content is not what was written", where=str(folder / name), fix=fix)
    reader = library.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist says
        library.load(tensors, storage_reader=reader, no_dist=True)
    for keys in record["tensors"]:
        *path, last = keys
        place = state
        for key in path:
            place = place[key]
        place[last] = tensors["/".join(keys)]


def folder_of(checkpoint: Path) -> str | None:
    """The name of the folder that has a checkpoint's parts; None where it has none, or is damaged. Raises OSError if it cannot be read."""
    try:
        # Mapped into memory, so that of a file with all tensors only the structure is read.
        record = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["parts"]
        return str(record["folder"]) if record is not None else None
    except Exception as error:  # unpickling a damaged file may raise anything
        if isinstance(error, (OSError, MemoryError)) or "unable to mmap" in str(error):
            raise OSError(f"{checkpoint}: {error}") from error
        return None


def remove_unused(run: Path, checkpoints: Collection[Path]) -> None:
    """Removes the parts that none of the run's checkpoints has; tidying up is no reason to fail.

    While a checkpoint cannot be read, nothing is removed: its parts may be whole.
    """
    root = run / FOLDER
    with suppress(OSError):
        used = {folder_of(path) for path in checkpoints} if root.is_dir() else set()
        for folder in list(root.iterdir()):
            if _NAME.fullmatch(folder.name) and folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)
        remove_if_empty(root)
