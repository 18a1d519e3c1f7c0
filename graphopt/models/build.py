"""Builds the backbone that a spec names, without running code that the user does not trust.

Specs are data that people share. So nothing is ever downloaded (weights are random or come from a file), only a `python` source
runs code (with `trust`), and weight files are safetensors or weights-only checkpoints.
"""

import inspect
import itertools
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

from graphopt.code import CodeError, named
from graphopt.errors import BackboneError, did_you_mean
from graphopt.models import cifar_resnet as cifar
from graphopt.models.catalog import check_name
from graphopt.models.weights import load_weights
from graphopt.units import show_size

#: more make no sense for a network of this kind, and tracing them would take hours
MOST_MODULES = 10_000

#: arguments of constructors that would download weights or open other files
_WEIGHTS = {"weights", "weights_backbone", "pretrained", "pretrained_backbone"}
_WEIGHTS |= {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def build(
    source: str,
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    weights: str | None = None,
    reset: Sequence[str] = (),
    entry: str | None = None,
    trust: bool = False,
) -> nn.Module:
    """The backbone in train mode, initialised from torch's current seed, then with `weights` loaded.

    Args:
        source: one of `catalog.SOURCES`.
        name: the library's name of the model; for python `"package.module:factory"` or `"file.py:factory"`.
        arguments: keyword arguments of the constructor.
        weights, reset, entry: a file, the modules that do not take their weights from it, and where in it the weights are
            (`graphopt.models.weights.load_weights`).
        trust: allow a `python` source.

    Raises:
        BackboneError: unknown name, arguments that do not fit, or code without trust.
        WeightsError: the weights do not fit, or cannot be read.
    """
    arguments, title = arguments or {}, f"backbone {source}/{name}"
    factory, described = _factory(source, name, trust)
    forbidden = sorted(_WEIGHTS & arguments.keys()) if source != "python" else []
    if forbidden:
        fix = 'Weights come from a file: weights = "model.safetensors"'
        raise BackboneError(f"argument {forbidden[0]!r} would download weights", where=title, fix=fix)
    try:
        with _bounded():
            module = factory(**arguments)
    except BackboneError as error:
        raise error.with_location(title) from None
    except Exception as error:
        raise _constructor_error(title, arguments, error, _accepted(described)) from error
    if not isinstance(module, nn.Module):
        raise BackboneError(f"gave a {type(module).__name__}, not a torch.nn.Module", where=title)
    if weights:
        load_weights(module, weights, reset=reset, entry=entry)
    return module.train()


def classifiers(module: nn.Module) -> list[nn.Module]:
    """The layers that a backbone of timm names as its classifier: several where distillation has added one, none of another library's."""
    named = getattr(module, "get_classifier", None)
    given = named() if named is not None else None
    return [head for head in (given if isinstance(given, tuple | list) else [given]) if isinstance(head, nn.Module)]


@torch.no_grad()
def init_head(module: nn.Module, scale: float, bias: float | None) -> None:
    """Multiplies the weights and biases of a timm backbone's classifier, in place; then sets its biases, unless `bias` is None.

    Raises BackboneError for a backbone that names no classifier, or has none.
    """
    parameters = [(name, p) for head in classifiers(module) for name, p in head.named_parameters()]
    if not parameters:
        raise BackboneError("names no classifier (backbones of timm do)", where="backbone.head_init", fix="Leave head_init out")
    for name, parameter in parameters:
        parameter.mul_(scale)
        if bias is not None and name.endswith("bias"):
            parameter.fill_(bias)


@contextmanager
def _bounded() -> Iterator[None]:
    """Refuses a backbone beyond this machine while it is being built: each module and parameter is counted when it is registered."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**36
    modules, total = itertools.count(1), 0

    def count_module(_parent: nn.Module, _name: str, _module: nn.Module) -> None:
        if next(modules) > MOST_MODULES:
            raise BackboneError(f"it has more than {MOST_MODULES:,} modules", fix="Ask for a smaller network")

    def count_parameter(_parent: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        nonlocal total
        total += parameter.numel() * parameter.element_size()
        if total > room:
            what = f"its parameters take more than {show_size(room)}, half of the memory here"
            raise BackboneError(what, fix="Ask for a smaller network")

    hooks = (register_module_module_registration_hook(count_module), register_module_parameter_registration_hook(count_parameter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _factory(source: str, name: str, trust: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The constructor, with downloads switched off, and the function whose signature has the arguments it takes."""
    check_name(source, name)
    if source == "python" and not trust:
        message = f"the spec names Python code ({name!r}), which would run"
        raise BackboneError(message, where="backbone", fix="Read it, then pass --trust")
    if source in ("python", "cifar"):
        constructor = _python(name) if source == "python" else cifar.constructor(name)
        return constructor, constructor
    if source == "timm":
        import timm

        return partial(timm.create_model, name, pretrained=False), timm.model_entrypoint(name)
    from torchvision import models

    builder = models.get_model_builder(name)
    # Builders of detection and segmentation models download weights of their backbones by default.
    off = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    return partial(builder, **off), builder


def _python(name: str) -> Callable[..., Any]:
    where = "backbone, name"
    try:
        value = named(name)
    except CodeError as error:
        raise BackboneError(error.what, where=where, fix=error.fix) from error
    if not callable(value):
        raise BackboneError(f"{name} is a {type(value).__name__}, not a factory", where=where)
    return value


def _accepted(function: Callable[..., Any]) -> list[str]:
    """Arguments that `function` takes by name, and those of the class it returns if it passes `**kwargs` on to that."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    found = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        try:
            returned = typing.get_type_hints(inspect.unwrap(function)).get("return")
        except Exception:  # the annotation cannot be evaluated
            returned = None
        if isinstance(returned, type) and issubclass(returned, nn.Module):
            found += [name for name in inspect.signature(returned).parameters if name not in found]
    return [name for name in found if name not in _WEIGHTS | {"kwargs", "progress"}]


def _constructor_error(title: str, arguments: Mapping[str, Any], error: Exception, accepted: list[str]) -> BackboneError:
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    takes = f"It takes {', '.join(accepted)}" if accepted else None
    if unexpected:
        fix = " ".join(filter(None, (did_you_mean(unexpected[1], accepted), takes))) or None
        return BackboneError(f"takes no argument {unexpected[1]!r}", where=f"{title}, arguments", fix=fix)
    given = ", ".join(f"{key} = {value!r}" for key, value in arguments.items())
    message = f"does not take arguments {{ {given} }}" if arguments else "cannot be built"
    where = f"{title}, arguments" if arguments else title
    return BackboneError(f"{message}: {type(error).__name__}: {error}", where=where, fix=takes)
