"""Activation checkpointing that a backbone does itself: what it covers is noted while tracing, so that it is kept."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import fx, nn
from torch.fx import Node

#: options of `torch.utils.checkpoint.checkpoint` that are not for the function it calls
_OPTIONS = set(inspect.signature(inspect.unwrap(torch.utils.checkpoint.checkpoint)).parameters) - {"function", "args", "kwargs"}


@contextmanager
def noting_checkpoints(backbone: nn.Module, graph: Callable[[], fx.Graph]) -> Iterator[list[tuple[Node, ...]]]:
    """Inside, `torch.utils.checkpoint.checkpoint` calls its function plainly, and the nodes that it made become an entry of the list.

    Args:
        backbone: the function is replaced where the forwards of its modules look for it.
        graph: the graph that is being traced.
    """
    original = torch.utils.checkpoint.checkpoint
    segments: list[tuple[Node, ...]] = []

    def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        last = next(iter(reversed(graph().nodes)), None)
        result = function(*args, **{key: value for key, value in kwargs.items() if key not in _OPTIONS})
        made: list[Node] = []
        for node in reversed(graph().nodes):
            if node is last:
                break
            made.append(node)
        segments.append(tuple(reversed(made)))
        return result

    def in_place_of(value: Any) -> Any:
        if isinstance(value, functools.partial) and value.func is original:
            return functools.partial(plain, *value.args, **value.keywords)
        return plain if value is original else value

    found = [(names, name, value) for names in _namespaces(backbone) for name, value in names.items()]
    replaced = [(names, name, value) for names, name, value in found if in_place_of(value) is not value]
    for names, name, value in replaced:
        names[name] = in_place_of(value)
    try:
        yield segments
    finally:
        for names, name, value in replaced:
            names[name] = value


def _namespaces(backbone: nn.Module) -> list[dict[str, Any]]:
    """Where the forwards of a backbone's modules, and timm's helpers, look names up; Hugging Face's look in the modules themselves."""
    spaces = [vars(torch.utils.checkpoint), *map(vars, backbone.modules())]
    for cls in {cls for module in backbone.modules() for cls in type(module).__mro__}:
        for function in vars(cls).values():
            names = getattr(inspect.unwrap(function), "__globals__", None) if callable(function) else None
            if names is not None and str(names.get("__name__", "")).partition(".")[0] != "torch":
                spaces.append(names)
    return list({id(names): names for names in spaces}.values())
