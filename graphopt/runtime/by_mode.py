"""Modules that do one thing in train mode and another in eval mode, and leaves that stay in eval mode, whatever `train()` says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

#: classes of torch.nn whose forward reads the mode; all others of torch.nn compute the same in both
_READ_MODE = (
    *(nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
    *(nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_RANDOM = {torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.bernoulli, torch.randint, torch.randperm, torch.normal}


class ByMode(nn.Module):
    """Calls `function` with the arguments of the module's mode.

    Args:
        function: what the traced node called: a function, or a method's name.
        train, eval: `(args, kwargs)` of each mode; a `Slot` stands where a run-time value goes.
    """

    def __init__(self, function: Callable[..., Any] | str, train: tuple[Any, Any], eval: tuple[Any, Any]) -> None:
        super().__init__()
        self.function, self.train_arguments, self.eval_arguments = function, train, eval

    def forward(self, *values: Any) -> Any:
        args, kwargs = self.arguments(values, self.training)
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def arguments(self, values: tuple[Any, ...], training: bool) -> tuple[Any, Any]:
        """`(args, kwargs)` of the call in one mode, where the run-time values are `values` (tensors, or nodes of a graph)."""
        filled: tuple[Any, Any] = _fill(self.train_arguments if training else self.eval_arguments, values)
        return filled

    def extra_repr(self) -> str:
        name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", str(self.function))
        return str(name)


class OutputByMode(nn.Module):
    """The backbone's output in each mode, where they differ (auxiliary heads)."""

    def forward(self, train: Any, eval: Any) -> Any:
        return train if self.training else eval


@dataclass(frozen=True)
class Slot:
    """A run-time value among a `ByMode`'s inputs, by its position."""

    index: int


def _fill(template: Any, values: tuple[Any, ...]) -> Any:
    if isinstance(template, Slot):
        return values[template.index]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(_fill(t, values) for t in template))
    if isinstance(template, (list, tuple)):
        return type(template)(_fill(t, values) for t in template)
    if isinstance(template, dict):
        return {k: _fill(t, values) for k, t in template.items()}
    if isinstance(template, slice):
        return slice(_fill(template.start, values), _fill(template.stop, values), _fill(template.step, values))
    return template


class AlwaysEval:
    """Mixed into a leaf's class: `training` is False, and stays so.

    What a prefix computes can be cached only if it is the same every time: norms use their running statistics, which stay put, there is
    no dropout and no random depth. Such a leaf shares the tensors of the one it replaces and is an instance of its class, so
    state-dict keys and type selectors do not notice.
    """

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass


@cache
def _class_for(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"AlwaysEval{original.__name__}", (AlwaysEval, original), {"__module__": __name__})


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module, or a part of it, may compute something else in training mode. An unknown module may."""
    known = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _READ_MODE)
    return not isinstance(module, AlwaysEval) and (not known or any(depends_on_mode(child) for child in module.children()))


def always_eval(module: nn.Module) -> nn.Module:
    """The form of `module` that stays in eval mode; it shares every tensor with `module`."""
    if not depends_on_mode(module):
        return module
    cls = _class_for(type(module))  # type: ignore[arg-type]  # classes are hashable
    new = cls.__new__(cls)
    # The very dicts of tensors, not copies: whoever still holds the old leaf must see `.to()` and a loaded state.
    new.__dict__.update({name: value for name, value in module.__dict__.items() if name != "training"})
    new.__dict__["_modules"] = {name: None if child is None else always_eval(child) for name, child in module._modules.items()}
    return new


def is_random(function: object) -> bool:
    """Whether a function draws random numbers each time it is called (`torch.rand_like`, `torch.bernoulli`)."""
    return function in _RANDOM
