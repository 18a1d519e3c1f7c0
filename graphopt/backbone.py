"""Build the user's backbone, and load its weights without running anything the spec did not earn trust for.

A spec is data that people share. So nothing is ever downloaded (random weights, or a file the spec names), only a
`python` source runs code (with trust), and weight files are safetensors or weights-only checkpoints.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt import cifar
from graphopt.errors import BackboneError, did_you_mean
from graphopt.spec.model import BackboneSpec

_SAVE = "Save model.state_dict(), best as safetensors"
SOURCES = ("torchvision", "timm", "cifar", "python")

#: Arguments that would fetch weights or open files behind the spec's back.
_WEIGHTS = frozenset({"pretrained", "weights", "weights_backbone", "pretrained_backbone"}) | frozenset(
    {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)


def build(spec: BackboneSpec, *, trust: bool = False, weights: bool = True) -> nn.Module:
    """The backbone in train mode, randomly initialised from torch's current seed, then with the spec's `weights`.

    Args:
        trust: allow a `python` source.
        weights: load `spec.weights`; False for a plan whose state comes from elsewhere (a checkpoint).

    Raises:
        BackboneError: unknown name, arguments that do not fit, weights that do not fit, code without trust.
    """
    factory, accepted = _factory(spec, trust)
    forbidden = sorted(_WEIGHTS & spec.arguments.keys()) if spec.source != "python" else []
    if forbidden:
        fix = 'Weights come from a file: weights = "model.safetensors"'
        raise BackboneError(f"argument {forbidden[0]!r} would fetch weights", where=_title(spec), fix=fix)
    try:
        module = factory(**spec.arguments)
    except Exception as error:
        raise _refused(spec, error, accepted()) from error
    if not isinstance(module, nn.Module):
        raise BackboneError(f"gave a {type(module).__name__}, not a torch.nn.Module", where=_title(spec))
    if weights and spec.weights:
        load_weights(module, spec.weights)
    return module.train()


def names(source: str) -> list[str]:
    """The backbones a source has; none for `python`."""
    if source == "timm":
        import timm

        return timm.list_models()
    if source == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    return cifar.names() if source == "cifar" else []


def resolve(text: str, *, arguments: Mapping[str, Any] | None = None, input: tuple[int, ...] | None = None) -> BackboneSpec:
    """`"timm/resnet50"` or `"python/package.module:factory"` as a spec; the input is the model's own unless given."""
    source, slash, name = text.partition("/")
    if not slash or source not in SOURCES:
        guess = did_you_mean(source, SOURCES) if slash else None
        fix = guess or f"Write source/name, the source being one of {', '.join(SOURCES)}: timm/resnet50"
        raise BackboneError(f"{text!r} is not source/name", fix=fix)
    shape = input or default_input(source, name, arguments or {})
    if shape is None:
        if source == "python":
            raise BackboneError("one sample's shape is not known", where=text, fix="Give it: --input 3,224,224")
        raise unknown(source, name)
    return BackboneSpec(source=typing.cast(Any, source), name=name, arguments=dict(arguments or {}), input=shape)


def default_input(source: str, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """One sample's shape by the library's own word; None for an unknown model and for python code."""
    if source == "cifar":
        return (int(arguments.get("in_chans", 3)), 32, 32)
    if source == "timm":
        import timm

        if not _hosted(name) and timm.is_model(name):
            config = timm.models.get_pretrained_cfg(name)
            channels, height, width = config.input_size if config else (3, 224, 224)
            size = arguments.get("img_size", (height, width))
            height, width = (size, size) if isinstance(size, int) else size
            return (int(arguments.get("in_chans", channels)), int(height), int(width))
    if source == "torchvision":
        import torchvision

        if name in torchvision.models.list_models():
            # Every image model takes 224 but the two that its documentation names; the video models say a clip's shape.
            side = 299 if name == "inception_v3" else 224
            if name in torchvision.models.list_models(torchvision.models.video):
                return (3, 16, side, side)
            return (3, side, side)
    return None


def _factory(spec: BackboneSpec, trust: bool) -> tuple[Callable[..., Any], Callable[[], list[str]]]:
    """The constructor with what must never be fetched switched off, and the names of the arguments it takes."""
    if spec.source == "python":
        if not trust:
            what = f"the spec names Python code ({spec.name!r}), which would run"
            raise BackboneError(what, where="backbone", fix="Read it, then pass --trust")
        function = _python(spec.name)
        return function, lambda: _accepted(function)
    if spec.source == "cifar":
        if not re.fullmatch(r"resnet\d+", spec.name) and spec.name not in cifar.names():
            raise unknown("cifar", spec.name)
        return partial(cifar.build, spec.name), lambda: cifar.arguments(spec.name)
    if spec.source == "timm":
        import timm

        if _hosted(spec.name) or not timm.is_model(spec.name):
            raise unknown("timm", spec.name)
        entry = timm.model_entrypoint(spec.name)
        create = partial(timm.create_model, spec.name, pretrained=False)
        return create, lambda: _accepted(entry)
    import torchvision

    if spec.name not in torchvision.models.list_models():
        raise unknown("torchvision", spec.name)
    builder = torchvision.models.get_model_builder(spec.name)
    # Detection and segmentation builders fetch their backbone's weights unless told otherwise.
    off = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return partial(builder, **off), lambda: _accepted(builder)


def _hosted(name: str) -> bool:
    """`hf-hub:...` and its like: timm would go to the network, or to a folder, for the model's own configuration."""
    return ":" in name or "/" in name


def _python(name: str) -> Callable[..., Any]:
    where = "backbone, name"
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise BackboneError(f"{name!r} is not package.module:factory", where=where)
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            fix = "It is looked for among the installed packages and in the working directory"
            raise BackboneError(f"no Python module {module_name!r}", where=where, fix=fix) from error
        raise BackboneError(f"{module_name} does not import: {error}", where=where) from error
    except Exception as error:
        what = f"{module_name} does not import: {type(error).__name__}: {error}"
        raise BackboneError(what, where=where) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            near = did_you_mean(part, known)
            raise BackboneError(f"{module_name} has no {attribute!r}", where=where, fix=near)
        found = getattr(found, part)
    if not callable(found):
        raise BackboneError(f"{name} is a {type(found).__name__}, not a factory", where=where)
    return found


def _accepted(function: Callable[..., Any]) -> list[str]:
    """Arguments that `function` takes by name, its class's where it passes `**kwargs` on to the class it returns."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    names_ = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        try:
            returned = typing.get_type_hints(inspect.unwrap(function)).get("return")
        except Exception:  # an annotation that does not evaluate tells us nothing
            returned = None
        if isinstance(returned, type) and issubclass(returned, nn.Module):
            names_ += [name for name in inspect.signature(returned).parameters if name not in names_]
    return [name for name in names_ if name not in _WEIGHTS | {"kwargs", "progress"}]


def _refused(spec: BackboneSpec, error: Exception, accepted: list[str]) -> BackboneError:
    if isinstance(error, BackboneError):
        return error.at(_title(spec))  # type: ignore[return-value]
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    takes = f"It takes {', '.join(accepted)}" if accepted else None
    if unexpected:
        near = did_you_mean(unexpected[1], accepted)
        fix = ". ".join(part for part in ((near or "").rstrip("."), takes) if part).replace("?.", "?") or None
        return BackboneError(f"takes no argument {unexpected[1]!r}", where=f"{_title(spec)}, arguments", fix=fix)
    if spec.arguments:
        given = ", ".join(f"{key} = {value!r}" for key, value in spec.arguments.items())
        what = f"does not take arguments {{ {given} }}: {type(error).__name__}: {error}"
        return BackboneError(what, where=f"{_title(spec)}, arguments", fix=takes)
    return BackboneError(f"cannot be built: {type(error).__name__}: {error}", where=_title(spec), fix=takes)


def _title(spec: BackboneSpec) -> str:
    return f"backbone {spec.source}/{spec.name}"


def unknown(source: str, name: str) -> BackboneError:
    """The error for a name that `source` does not have: the nearest names, or the source that has it."""
    if source == "timm" and _hosted(name):
        fix: str | None = 'Use timm\'s own name, and weights = "file"'
        return BackboneError(f"{name!r} would be fetched", where="backbone, name", fix=fix)
    fix = did_you_mean(name, names(source))
    elsewhere = [other for other in ("torchvision", "timm", "cifar") if other != source and name in names(other)]
    if elsewhere:
        fix = f"{elsewhere[0]} has one: source = {elsewhere[0]!r}".replace("'", '"')
    return BackboneError(f"{source} has no model {name!r}", where="backbone, name", fix=fix)


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
