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
from typing import Any, NamedTuple

from graphopt.errors import RunError
from graphopt.files import cache_folder, read_text, sealed, unsealed, write_atomically

#: changes with what an index holds
FORMAT_VERSION = 2


class Preparation(NamedTuple):
    """How the weights that a library publishes for a backbone expect images, and where their classifier is."""

    mean: Sequence[float]  # per channel, of pixels in 0..1
    std: Sequence[float]
    interpolation: str
    crop_pct: float
    classifier: Sequence[str]  # paths of modules; several where distillation has added one


class Index(NamedTuple):
    """The backbones of one library.

    Attributes:
        names: those that it lists. inputs: the shape of one sample for each name that it takes, old names and names of weights included.
        preparations: those that its weights know, each once. prepared: the number of a backbone's own among them.
    """

    names: Sequence[str]
    inputs: Mapping[str, Sequence[int]]
    preparations: Sequence[Preparation] = ()
    prepared: Mapping[str, int] = {}


@cache
def index(library: str) -> Index:
    """The backbones of `timm` or `torchvision`; imports the library only where the cache does not have them."""
    path = None
    with suppress(OSError, RuntimeError):  # there is no home
        path = cache_folder("backbones") / f"{library}-{_stamp(library)}.json"
        with suppress(OSError, ValueError, KeyError):
            record = unsealed(read_text(path))
            return Index(record["names"], record["inputs"], [Preparation(*p) for p in record["preparations"]], record["prepared"])
    found = _timm() if library == "timm" else _torchvision()
    with suppress(OSError, RunError):  # a cache that cannot be written costs time only
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, sealed(found._asdict()))
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
    inputs = {name: config.input_size if config else (3, 224, 224) for name, config in configs.items()}
    prepared = {name: _preparation(config) for name, config in configs.items() if config}
    numbers = {preparation: number for number, preparation in enumerate(dict.fromkeys(prepared.values()))}
    return Index(timm.list_models(), inputs, list(numbers), {name: numbers[preparation] for name, preparation in prepared.items()})


def _preparation(config: Any) -> Preparation:
    head = config.classifier or ()
    names = (head,) if isinstance(head, str) else tuple(head)
    return Preparation(tuple(config.mean), tuple(config.std), config.interpolation, config.crop_pct, names)


def _torchvision() -> Index:
    models = import_module("torchvision.models")
    names, videos = models.list_models(), set(models.list_models(models.video))

    def shape(name: str) -> tuple[int, ...]:
        # Image models take 224 pixels, except for the one that the documentation names; video models take clips of 16 frames.
        side = 299 if name == "inception_v3" else 224
        return (3, 16, side, side) if name in videos else (3, side, side)

    return Index(names, {name: shape(name) for name in names})
