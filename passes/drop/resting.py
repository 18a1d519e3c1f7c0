"""Eval semantics by rewrite: a leaf that never hears of training mode.

What a prefix computes may be kept only if it is the same every time: norms by their running statistics, which stay put, no dropout, no
random depth, whatever `module.train()` says. A resting leaf shares the tensors of the one it replaces and is an instance of its class, so
state-dict keys and type selectors do not notice.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

#: classes of torch.nn whose forward reads the mode; all others of torch.nn compute the same in both
_BY_MODE = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


class Resting:
    """Marks a resting leaf."""

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        pass


@cache
def _class_for(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Resting{original.__name__}", (Resting, original), {"__module__": __name__})


def by_mode(module: nn.Module) -> bool:
    """Whether a module, or a part of it, may compute something else in training mode. What we do not know may."""
    known = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, _BY_MODE)
    return not isinstance(module, Resting) and (not known or any(by_mode(child) for child in module.children()))


def resting(module: nn.Module) -> nn.Module:
    """The form of `module` that is in eval mode for good; it shares every tensor with `module`."""
    if not by_mode(module):
        return module
    cls = _class_for(type(module))
    new = cls.__new__(cls)
    # The very dicts of tensors, not copies: whoever still holds the old leaf must see `.to()` and a loaded state.
    new.__dict__.update({name: value for name, value in module.__dict__.items() if name != "training"})
    new.__dict__["_modules"] = {name: None if child is None else resting(child) for name, child in module._modules.items()}
    return new


def is_random(function: object) -> bool:
    """Whether a function draws random numbers each time it is called with these arguments' defaults (`torch.rand_like`, `bernoulli`)."""
    return function in _RANDOM


_RANDOM = {torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.bernoulli, torch.randint, torch.randperm, torch.normal}
