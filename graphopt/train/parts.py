"""The sharded tensors of a checkpoint, in parts: every rank writes its own, with torch.distributed.checkpoint.

The parts are safetensors files in a folder `parts/step-00000042` of the run. The checkpoint itself (`last.pt` and the others) holds all
else, the folder's name and the digest of each file, and is written last: parts without it are what an interrupted save has left.
"""

import hashlib
import math
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import RunError, listed
from graphopt.files import reason, remove_if_empty, sync_file, sync_folder
from graphopt.runtime.shards import is_sharded
from graphopt.train.ranks import ALONE, NOTICE, Ranks

FOLDER = "parts"
#: bytes of tensors that ranks give each other at once
_TOGETHER = 2**26
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
    about = [(list(keys), list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for keys, tensor in tensors.items()]
    return {"folder": name, "files": files, "tensors": about}


def _free_name(root: Path, step: int) -> str:
    """A folder that does not exist: a run that goes on from before this step must not write into the parts of another checkpoint."""
    names = (f"step-{step:08d}{suffix}" for suffix in chain([""], (f"-{number}" for number in count(2))))
    return next(name for name in names if not (root / name).exists())


def _digests(folder: Path, ranks: Ranks) -> list[dict[str, str]]:
    """Per rank, its files, which are on disk then, and their digests."""
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
    files = [found for found, _ in told]
    missing = ranks.broadcast(_missing(folder, list(chain(*files)), NOTICE) if ranks.first else None)
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


#: a tensor of which this rank holds these rows, from them and the whole one's shape
Shard = Callable[[Tensor, Sequence[int]], Tensor]


def read(state: dict[str, Any], run: Path, record: Mapping[str, Any], ranks: Ranks = ALONE, shard: Shard | None = None) -> None:
    """Puts the tensors that `split` has taken out of `state` back, on the CPU; all ranks have to call it.

    Each part is read and checked by one rank, its own by a rank of as many. Tensors become whole on every rank, or sharded with `shard`:
    where as many ranks have written them, nothing but the parts' digests is exchanged then.

    Raises RunError on every rank, which names the file, if a part is missing, damaged or one too many.
    """
    folder, files = run / FOLDER / record["folder"], record["files"]
    mine = range(ranks.number, len(files), ranks.count)
    missing = ranks.gather(_missing(folder, [name for number in mine for name in files[number]]))
    if names := list(chain(*missing)):
        what = f"{len(names)} of the {sum(map(len, files))} parts that {len(files)} ranks wrote are missing: {listed(names)}"
        raise RunError(what, where=str(folder))
    rows = ranks.together(lambda: _own_rows(folder, files, mine, others=ranks.first))
    if shard is not None and ranks.count == len(files):
        for keys, shape, dtype in record["tensors"]:
            none = torch.empty(0, *shape[1:], dtype=getattr(torch, dtype))
            _put(state, keys, shard(rows[ranks.number].pop("/".join(keys), none), shape))
        return
    for group in _groups(record["tensors"]):
        names = ["/".join(keys) for keys, *_ in group]
        given = ranks.gather({name: {number: rows[number].pop(name) for number in mine if name in rows[number]} for name in names})
        for name, (keys, shape, _) in zip(names, group, strict=True):
            pieces = {number: piece for of in given for number, piece in of[name].items()}
            whole = torch.cat([pieces[number] for number in sorted(pieces)])
            if list(whole.shape) != shape:
                raise RunError(f"the parts of {name} do not make up a tensor of shape {tuple(shape)}", where=str(folder))
            _put(state, keys, shard(_rows_of(whole, ranks), shape) if shard is not None else whole)


def _own_rows(folder: Path, files: Sequence[Mapping[str, str]], mine: Sequence[int], *, others: bool) -> dict[int, dict[str, Tensor]]:
    """The tensors in the parts of the ranks `mine`, by the name in the file; with `others`, files that are no parts are looked for."""
    from safetensors.torch import load

    if others and (more := sorted({path.name for path in folder.glob("*.safetensors")} - set(chain(*files)))):
        raise RunError(f"files that are no parts of the checkpoint: {listed(more)}", where=str(folder), fix="Remove them")
    found: dict[int, dict[str, Tensor]] = {number: {} for number in mine}
    for number in mine:
        for name, digest in files[number].items():
            try:
                content = (folder / name).read_bytes()
            except OSError as error:
                raise RunError(f"cannot be read: {reason(error)}", where=str(folder / name)) from error
            if hashlib.blake2b(content, digest_size=16).hexdigest() != digest:
                raise RunError("is damaged: its content is not what was written", where=str(folder / name))
            found[number] |= load(content)
    return found


def _groups(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Consecutive tensors of a record, of a limited number of bytes each time."""
    group: list[Any] = []
    size = 0
    for about in tensors:
        group.append(about)
        size += math.prod(about[1]) * getattr(torch, about[2]).itemsize
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    yield group


def _rows_of(whole: Tensor, ranks: Ranks) -> Tensor:
    """A rank's rows of a tensor, as `torch.chunk` and sharding divide it."""
    each = -(-len(whole) // ranks.count)
    return whole[each * ranks.number : each * (ranks.number + 1)].clone()


def _put(state: Any, keys: Sequence[str], value: Tensor) -> None:
    *path, last = keys
    for key in path:
        state = state[key]
    state[last] = value


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
