"""Frozen forms of leaf modules: eval semantics for norms, lean operators where something before them trains.

A frozen form shares the parameters, buffers and children of the module it replaces, and is an instance of the same class; so state-dict
keys, `isinstance` tests and type selectors do not notice. What has no frozen form stays stock.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from graphopt.passes.freeze import activations, operators
from graphopt.runtime.by_mode import AlwaysEval


# -- what a frozen form computes: forwards that take the place of the original class's ------------------------------------------------
class _Conv:
    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return operators.conv(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padded = operators.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return operators.conv(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class _ConvSame:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = pad_same(x, self.weight.shape[-2:], self.stride, self.dilation)
        return operators.conv(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _ConvTranspose:
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        n = len(self.kernel_size)
        extra = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation)
        return operators.conv_transpose(input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


class _Linear:
    def forward(self: Any, input: Tensor) -> Tensor:
        return operators.linear(input, self.weight, self.bias)


class _LayerNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        return operators.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _GroupNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        return operators.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _ReLU:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.relu(input)


class _Hardtanh:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.hardtanh(input, self.min_val, self.max_val)


class _LeakyReLU:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.leaky_relu(input, self.negative_slope)


class _PReLU:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.prelu(input, self.weight)


class _Hardsigmoid:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.hardsigmoid(input)


class _MaxPool2d:
    def forward(self: Any, input: Tensor) -> Tensor:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        return activations.max_pool2d(input, *sizes, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class _AvgPool2d:
    def forward(self: Any, input: Tensor) -> Tensor:
        sizes = (self.kernel_size, self.stride, self.padding)
        return activations.avg_pool2d(input, *sizes, self.ceil_mode, self.count_include_pad, self.divisor_override)


class _AdaptiveAvgPool2d:
    def forward(self: Any, input: Tensor) -> Tensor:
        return activations.adaptive_avg_pool2d(input, self.output_size)


class _EvalBatchNorm:
    """By the running statistics in both modes, and they stay put."""

    def forward(self: Any, input: Tensor) -> Tensor:
        norm = operators.batch_norm if self.lean else F.batch_norm
        return norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _EvalBatchNormAct(_EvalBatchNorm):
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(_EvalBatchNorm.forward(self, x)))


class _EvalInstanceNorm:
    def _apply_instance_norm(self: Any, input: Tensor) -> Tensor:
        norm = operators.instance_norm if self.lean else F.instance_norm
        return norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


#: original class, what changes, and the method that must be that class's own for its form to fit a subclass
_LEAN: tuple[tuple[type[nn.Module], type, str], ...] = (
    (Conv2dSame, _ConvSame, "forward"),
    *((c, _Conv, "forward") for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    *((c, _ConvTranspose, "forward") for c in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    (nn.Linear, _Linear, "forward"),
    (nn.LayerNorm, _LayerNorm, "forward"),
    (nn.GroupNorm, _GroupNorm, "forward"),
    (nn.ReLU, _ReLU, "forward"),
    (nn.Hardtanh, _Hardtanh, "forward"),
    (nn.LeakyReLU, _LeakyReLU, "forward"),
    (nn.PReLU, _PReLU, "forward"),
    (nn.Hardsigmoid, _Hardsigmoid, "forward"),
    (nn.MaxPool2d, _MaxPool2d, "forward"),
    (nn.AvgPool2d, _AvgPool2d, "forward"),
    (nn.AdaptiveAvgPool2d, _AdaptiveAvgPool2d, "forward"),
)
_EVAL: tuple[tuple[type[nn.Module], type, str], ...] = (
    (BatchNormAct2d, _EvalBatchNormAct, "forward"),
    (nn.SyncBatchNorm, _EvalBatchNorm, "forward"),
    (_BatchNorm, _EvalBatchNorm, "forward"),
    (_InstanceNorm, _EvalInstanceNorm, "_apply_instance_norm"),
)

#: stock functions, and their lean forms with the same arguments
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), operators.conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), operators.conv_transpose),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), operators.conv_transpose),
    F.linear: operators.linear,
    F.pad: operators.pad,
    F.layer_norm: operators.layer_norm,
    F.group_norm: operators.group_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), activations.relu),
    F.relu6: activations.relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), activations.hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), activations.leaky_relu),
    **dict.fromkeys((F.prelu, torch.prelu), activations.prelu),
    F.hardsigmoid: activations.hardsigmoid,
    F.max_pool2d: activations.max_pool2d,
    F.avg_pool2d: activations.avg_pool2d,
    F.adaptive_avg_pool2d: activations.adaptive_avg_pool2d,
}
#: tensor methods, and their lean forms
METHODS: dict[str, Callable[..., Any]] = {"relu": activations.relu, "relu_": activations.relu}
#: functions that normalise by running statistics when given them: (stock, name of the argument that says otherwise, lean)
NORM_FUNCTIONS: dict[Any, tuple[str, Callable[..., Any]]] = {
    F.batch_norm: ("training", operators.batch_norm),
    F.instance_norm: ("use_input_stats", operators.instance_norm),
}


def frozen_form(module: nn.Module, *, lean: bool) -> nn.Module | None:
    """The module that takes a frozen leaf's place, sharing its tensors; None where the leaf can stay.

    Args:
        lean: whether it lies behind something that trains; otherwise only norms change.
    """
    return _frozen_form(module, lean, inside=False)


def _frozen_form(module: nn.Module, lean: bool, inside: bool) -> nn.Module | None:
    if isinstance(module, _Frozen) and (module.lean or not lean):
        return None
    if isinstance(getattr(module, "running_mean", None), Tensor):
        change = _change_for(module, _EVAL) or AlwaysEval
        # The act of a BatchNormAct2d follows at once on a fresh tensor: in place or not is all the same.
        return _become(module, change, lean, _changed_children(module, lean, inside=change is not _EvalBatchNormAct))
    if _moves_its_buffers(module):
        return _become(module, AlwaysEval, lean, _changed_children(module, lean, inside=True))
    operator = _change_for(module, _LEAN) if lean else None
    # Inside a module that stays whole, code may count on an activation having worked in place.
    if operator is not None and not (inside and getattr(module, "inplace", False)):
        return _become(module, operator, lean, {})
    children = _changed_children(module, lean, inside=True)
    if not children:
        return None
    new = copy.copy(module)
    new._modules = {**module._modules, **children}
    return new


def _moves_its_buffers(module: nn.Module) -> bool:
    """Whether an unknown module's own forward may update statistics of its own in train mode."""
    statistics = any(b is not None and b.is_floating_point() for b in module._buffers.values())
    if not statistics or type(module).__module__.startswith("torch.nn."):
        return False
    code = getattr(inspect.unwrap(original_class(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def _changed_children(module: nn.Module, lean: bool, inside: bool) -> dict[str, nn.Module]:
    forms = {name: _frozen_form(child, lean, inside) for name, child in module.named_children()}
    return {name: form for name, form in forms.items() if form is not None}


def _change_for(module: nn.Module, table: tuple[tuple[type[nn.Module], type, str], ...]) -> type | None:
    cls = original_class(module)
    for original, change, method in table:
        if issubclass(cls, original):
            # A subclass with a forward of its own computes something else.
            return change if getattr(cls, method) is getattr(original, method) else None
    return None


class _Frozen:
    """Marks a frozen form. `lean` says whether its backward is, `original` what class it had."""

    lean: bool
    original: type[nn.Module]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was frozen."""
    return module.original if isinstance(module, _Frozen) else type(module)


@cache
def _class_for(original: type[nn.Module], change: type) -> type[nn.Module]:
    return type(f"Frozen{original.__name__}", (_Frozen, change, original), {"__module__": __name__, "original": original})


def _become(module: nn.Module, change: type, lean: bool, children: dict[str, nn.Module]) -> nn.Module:
    cls = _class_for(original_class(module), change)  # type: ignore[arg-type]  # classes are hashable
    new = cls.__new__(cls)
    # The very dicts of tensors, not copies: whoever still holds the old leaf must see `.to()` and a loaded state.
    new.__dict__ = dict(module.__dict__)
    new.__dict__["lean"] = lean
    if children:
        new.__dict__["_modules"] = {**module._modules, **children}
    return new
