"""Layers and functions whose result surely looks like their first argument: a trace need not evaluate them."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: layers whose output has the shape and dtype of their input: nothing needs to run to know it
_FORWARDS = {
    layer.forward
    for layer in (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.Identity, nn.Dropout, nn.Dropout2d),
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU),
    )
}
#: functions of which the same is true of their first argument
_FUNCTIONS = {
    *(F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.dropout, F.dropout2d),
    *(F.batch_norm, F.layer_norm, F.group_norm, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
}
#: functions of which it is true where both arguments are alike
_SUMS = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul}


def layer_keeps_shape(layer: nn.Module) -> bool:
    """Whether the output of a layer surely has the shape and the dtype of its input."""
    return type(layer).forward in _FORWARDS


def keeps_shape(function: Any, args: Any) -> bool:
    """Whether the result of a function surely has the shape and the dtype of its first argument."""
    if not args or not isinstance(args[0], Tensor):
        return False
    if function in _SUMS and len(args) == 2 and isinstance(args[1], Tensor):
        return args[0].shape == args[1].shape and args[0].dtype == args[1].dtype
    return function in _FUNCTIONS
