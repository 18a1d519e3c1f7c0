"""Which backbones timm and torchvision have, and the input of each, without importing them, which takes seconds.

What a library says of itself is kept in the user's cache folder, one file for each installed copy of a library; it is asked again when
one of the files that define its models has changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from graphopt.errors import RunError
from graphopt.files import cache_folder, read_text, sealed, unsealed, write_atomically

#: changes with what an index holds
FORMAT_VERSION = 1


class Index(NamedTuple):
    """The backbones of one library.

    Attributes:
        names: those that it lists. inputs: the shape of one sample for each name that it takes, old names and names of weights included.
    """

    names: Sequence[str]
    inputs: Mapping[str, Sequence[int]]


@cache
def index(library: str) -> Index:
    """The backbones of `timm` or `torchvision`; imports the library only where the cache does not have them."""
    path = None
    with suppress(OSError, RuntimeError):  # there is no home
        path = cache_folder("backbones") / f"{library}-{_stamp(library)}.json"
        with suppress(OSError, ValueError, KeyError):
            record = unsealed(read_text(path))
            return Index(record["names"], record["inputs"])
    found = _timm() if library == "timm" else _torchvision()
    with suppress(OSError, RunError):  # a cache that cannot be written costs time only
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, sealed({"names": list(found.names), "inputs": {name: list(s) for name, s in found.inputs.items()}}))
    return found


def _stamp(library: str) -> str:
    """Changes with the name, size or time of a file that defines models."""
    package = find_spec(library)
    folders = package.submodule_search_locations if package is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder, "models").rglob("*.py"))
    stamps = [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, stamps]).encode()).hexdigest()[:16]


def _timm() -> Index:
    timm = import_module("timm")
    registry = import_module("timm.models._registry")
    # Names of models with those that timm renamed, and names with a tag of weights, which can have another input.
    names = sorted({*registry._model_entrypoints, *registry._model_pretrained_cfgs})
    configs = {name: timm.models.get_pretrained_cfg(name) for name in names}
    return Index(timm.list_models(), {name: config.input_size if config else (3, 224, 224) for name, config in configs.items()})


def _torchvision() -> Index:
    models = import_module("torchvision.models")
    names, videos = models.list_models(), set(models.list_models(models.video))

    def shape(name: str) -> tuple[int, ...]:
        # Image models take 224 pixels, except for the one that the documentation names; video models take clips of 16 frames.
        side = 299 if name == "inception_v3" else 224
        return (3, 16, side, side) if name in videos else (3, side, side)

    return Index(names, {name: shape(name) for name in names})
