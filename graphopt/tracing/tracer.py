"""`nn.Module` -> flat `fx.Graph`, with the leaf registries that timm and torchvision publish."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import timm.layers
import timm.models
import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth, misc

from graphopt.errors import TraceError

#: torchvision's own leaves: modules whose forward branches on data or on the mode.
_TORCHVISION_LEAVES = (StochasticDepth, misc.FrozenBatchNorm2d)


class Tracer(fx.Tracer):
    """Traces through containers and stops at leaves.

    A leaf is a `torch.nn` layer, a module that timm or torchvision registers as one, a childless module whose own forward asks
    for `self.training` (it must stay a module to follow the mode), or a path that the caller calls opaque.

    Args:
        opaque: module paths to keep whole because they cannot be traced, or differ by mode.
    """

    def __init__(self, opaque: Iterable[str] = ()) -> None:
        functions = tuple(f for f in timm.layers.get_notrace_functions() if callable(f))
        super().__init__(autowrap_modules=(math,), autowrap_functions=functions)
        self.proxy_buffer_attributes = True
        self.opaque = frozenset(opaque)
        self._registered = (*timm.layers.get_notrace_modules(), *_TORCHVISION_LEAVES)
        #: path of the innermost module whose forward raised, after a failed trace.
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or isinstance(m, self._registered):
            return True
        return super().is_leaf_module(m, module_qualified_name) or _asks_for_mode(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.failed = None
        graph = super().trace(root, concrete_args)
        # Arguments with defaults are constants of the graph; tracing leaves their placeholders behind, with asserts on the value.
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        for node in [
            n for n in inputs if n.target in (concrete_args or {}) or str(n.target).rstrip("_0123456789") in (concrete_args or {})
        ]:
            _erase_with_users(graph, node)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise TraceError(
                f"the backbone's forward takes {len(inputs)} required inputs",
                where=type(root).__name__,
                fix="graphopt compiles backbones with one image input: wrap yours so that forward(x) is enough",
            )
        return graph


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def optional_arguments(module: nn.Module) -> dict[str, Any]:
    """Defaults of the forward's arguments after the first: they are part of the graph, not inputs of it."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a childless module's own forward reads `self.training` (DropPath, a user's noise layer)."""
    if next(module.children(), None) is not None:
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def constants_of(root: nn.Module, graph: fx.Graph, own: set[str]) -> dict[str, torch.Tensor]:
    """Tensors that tracing had to park on `root` (`_tensor_constant0`), by name; `own` are the names it had before."""
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr" and "." not in node.target and node.target not in own:
            value = getattr(root, node.target)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found
