"""Build the user's backbone, and load its weights without running anything the spec did not earn trust for.

A spec is data that people share. So nothing is ever downloaded (random weights, or a file the spec names), only a
`python` source runs code (with trust), and weight files are safetensors or weights-only checkpoints.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.errors import BackboneError, did_you_mean
from graphopt.models import cifar_resnet as cifar
from graphopt.models.catalog import is_hosted, unknown
from graphopt.models.weights import load_weights

#: Arguments that would fetch weights or open files behind the spec's back.
_WEIGHTS = frozenset({"pretrained", "weights", "weights_backbone", "pretrained_backbone"}) | frozenset(
    {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
)


def build(
    source: str, name: str, arguments: Mapping[str, Any] | None = None, *, weights: str | None = None, trust: bool = False
) -> nn.Module:
    """The backbone in train mode, randomly initialised from torch's current seed, then with `weights`.

    Args:
        trust: allow a `python` source.
        source: one of `catalog.SOURCES`. name: the library's name; for python `"package.module:factory"`.
        arguments: keyword arguments of the constructor.
        weights: a safetensors file or weights-only checkpoint, loaded strictly.

    Raises:
        BackboneError: unknown name, arguments that do not fit, weights that do not fit, code without trust.
    """
    arguments = arguments or {}
    factory, accepted = _factory(source, name, trust)
    forbidden = sorted(_WEIGHTS & arguments.keys()) if source != "python" else []
    if forbidden:
        fix = 'Weights come from a file: weights = "model.safetensors"'
        raise BackboneError(f"argument {forbidden[0]!r} would fetch weights", where=_title(source, name), fix=fix)
    try:
        module = factory(**arguments)
    except Exception as error:
        raise _refused(source, name, arguments, error, accepted()) from error
    if not isinstance(module, nn.Module):
        raise BackboneError(f"gave a {type(module).__name__}, not a torch.nn.Module", where=_title(source, name))
    if weights:
        load_weights(module, weights)
    return module.train()


def _factory(source: str, name: str, trust: bool) -> tuple[Callable[..., Any], Callable[[], list[str]]]:
    """The constructor with what must never be fetched switched off, and the names of the arguments it takes."""
    if source == "python":
        if not trust:
            what = f"the spec names Python code ({name!r}), which would run"
            raise BackboneError(what, where="backbone", fix="Read it, then pass --trust")
        function = _python(name)
        return function, lambda: _accepted(function)
    if source == "cifar":
        if not re.fullmatch(r"resnet\d+", name) and name not in cifar.names():
            raise unknown("cifar", name)
        return partial(cifar.build, name), lambda: cifar.arguments(name)
    if source == "timm":
        import timm

        if is_hosted(name) or not timm.is_model(name):
            raise unknown("timm", name)
        entry = timm.model_entrypoint(name)
        create = partial(timm.create_model, name, pretrained=False)
        return create, lambda: _accepted(entry)
    import torchvision

    if name not in torchvision.models.list_models():
        raise unknown("torchvision", name)
    builder = torchvision.models.get_model_builder(name)
    # Detection and segmentation builders fetch their backbone's weights unless told otherwise.
    off = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return partial(builder, **off), lambda: _accepted(builder)


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


def _refused(source: str, name: str, arguments: Mapping[str, Any], error: Exception, accepted: list[str]) -> BackboneError:
    if isinstance(error, BackboneError):
        return error.with_location(_title(source, name))
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    takes = f"It takes {', '.join(accepted)}" if accepted else None
    if unexpected:
        near = did_you_mean(unexpected[1], accepted)
        fix = ". ".join(part for part in ((near or "").rstrip("."), takes) if part).replace("?.", "?") or None
        return BackboneError(f"takes no argument {unexpected[1]!r}", where=f"{_title(source, name)}, arguments", fix=fix)
    if arguments:
        given = ", ".join(f"{key} = {value!r}" for key, value in arguments.items())
        what = f"does not take arguments {{ {given} }}: {type(error).__name__}: {error}"
        return BackboneError(what, where=f"{_title(source, name)}, arguments", fix=takes)
    return BackboneError(f"cannot be built: {type(error).__name__}: {error}", where=_title(source, name), fix=takes)


def _title(source: str, name: str) -> str:
    return f"backbone {source}/{name}"
