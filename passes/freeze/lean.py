"""Frozen forms of leaf modules: eval semantics for norms, lean operators where something before them trains.

A frozen form shares the parameters, buffers and children of the module it replaces, and is an instance of the same class; so state-dict
keys, `isinstance` tests and type selectors do not notice. What has no frozen form stays stock.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from graphopt.passes.freeze import activations, operators
from graphopt.runtime.by_mode import AlwaysEval
from graphopt.runtime.loaded import loaded

Method = Callable[..., Tensor]


def _conv(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if self.padding_mode == "zeros":
        return operators.conv(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
    padded = operators.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
    return operators.conv(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def _conv_same(self: Any, x: Tensor) -> Tensor:
    from timm.layers.padding import pad_same

    x = pad_same(x, self.weight.shape[-2:], self.stride, self.dilation)
    return operators.conv(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _conv_transpose(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    n = len(self.kernel_size)
    extra = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation)
    return operators.conv_transpose(input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


def _max_pool2d(self: Any, input: Tensor) -> Tensor:
    sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
    return activations.max_pool2d(input, *sizes, self.ceil_mode, self.return_indices)


def _avg_pool2d(self: Any, input: Tensor) -> Tensor:
    sizes = (self.kernel_size, self.stride, self.padding)
    return activations.avg_pool2d(input, *sizes, self.ceil_mode, self.count_include_pad, self.divisor_override)


def _eval_batch_norm(self: Any, input: Tensor) -> Tensor:
    norm = operators.batch_norm if self.lean else F.batch_norm
    return norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def _eval_batch_norm_act(self: Any, x: Tensor) -> Tensor:
    return self.act(self.drop(_eval_batch_norm(self, x)))


def _eval_instance_norm(self: Any, input: Tensor) -> Tensor:
    norm = operators.instance_norm if self.lean else F.instance_norm
    return norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


#: original class -> its forward in the lean form; for a convolution, its `_conv_forward`
_LEAN: dict[type[nn.Module], Method] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose),
    nn.Linear: lambda self, input: operators.linear(input, self.weight, self.bias),
    nn.LayerNorm: lambda self, input: operators.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps),
    nn.GroupNorm: lambda self, input: operators.group_norm(input, self.num_groups, self.weight, self.bias, self.eps),
    nn.ReLU: lambda self, input: activations.relu(input),
    nn.Hardtanh: lambda self, input: activations.hardtanh(input, self.min_val, self.max_val),
    nn.LeakyReLU: lambda self, input: activations.leaky_relu(input, self.negative_slope),
    nn.PReLU: lambda self, input: activations.prelu(input, self.weight),
    nn.Hardsigmoid: lambda self, input: activations.hardsigmoid(input),
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: lambda self, input: activations.adaptive_avg_pool2d(input, self.output_size),
}
#: the same in eval semantics: by the running statistics in both modes, and they stay as they are
_EVAL: dict[type[nn.Module], Method] = {
    **dict.fromkeys((nn.SyncBatchNorm, _BatchNorm), _eval_batch_norm),
    _InstanceNorm: _eval_instance_norm,
}
#: the same for classes of timm, by module and name: a network that has one has imported it
_TIMM_LEAN = {("timm.layers.conv2d_same", "Conv2dSame"): _conv_same}
_TIMM_EVAL = {("timm.layers.norm_act", "BatchNormAct2d"): _eval_batch_norm_act}
#: what these replace, where it is not `forward`
_REPLACED = {_conv: "_conv_forward", _eval_instance_norm: "_apply_instance_norm"}

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


def frozen_form(module: nn.Module, *, lean: bool, inside: bool = False) -> nn.Module | None:
    """The module that takes a frozen leaf's place, sharing its tensors; None where the leaf can stay.

    Args:
        lean: whether something before it trains; otherwise only norms change.
        inside: whether it is part of a module that stays whole, whose code may count on an activation having worked in place.
    """
    if isinstance(module, _Frozen) and (module.lean or not lean):
        return None
    if isinstance(getattr(module, "running_mean", None), Tensor):
        method = _method_for(module, _TIMM_EVAL, _EVAL)
        # The act of a BatchNormAct2d follows at once on a fresh tensor: in place or not is all the same.
        return _become(module, method, lean, _changed_children(module, lean, inside=method is not _eval_batch_norm_act))
    if _moves_its_buffers(module):
        return _become(module, None, lean, _changed_children(module, lean))
    method = _method_for(module, _TIMM_LEAN, _LEAN) if lean else None
    if method is not None and not (inside and getattr(module, "inplace", False)):
        return _become(module, method, lean, {})
    children = _changed_children(module, lean)
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


def _changed_children(module: nn.Module, lean: bool, inside: bool = True) -> dict[str, nn.Module]:
    forms = {name: frozen_form(child, lean=lean, inside=inside) for name, child in module.named_children()}
    return {name: form for name, form in forms.items() if form is not None}


def _method_for(module: nn.Module, of_timm: Mapping[tuple[str, str], Method], table: Mapping[type[nn.Module], Method]) -> Method | None:
    cls = original_class(module)
    known = [(original, method) for (file, name), method in of_timm.items() for original in loaded(file, name)]
    for original, method in (*known, *table.items()):
        if issubclass(cls, original):
            # A subclass with a forward of its own computes something else.
            names = ("forward", _REPLACED.get(method, "forward"))
            return method if all(getattr(cls, n) is getattr(original, n) for n in names) else None
    return None


class _Frozen:
    """Base of frozen forms. `lean` says whether its backward is, `original` what class it had."""

    lean: bool
    original: type[nn.Module]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was frozen."""
    return module.original if isinstance(module, _Frozen) else type(module)


@cache
def _class_for(original: type[nn.Module], method: Method | None) -> type[nn.Module]:
    bases = (_Frozen, AlwaysEval, original) if method is None else (_Frozen, original)
    replaced = {} if method is None else {_REPLACED.get(method, "forward"): method}
    return type(f"Frozen{original.__name__}", bases, {"__module__": __name__, "original": original, **replaced})


def _become(module: nn.Module, method: Method | None, lean: bool, children: dict[str, nn.Module]) -> nn.Module:
    """A frozen form that computes by `method`, or as the module itself does in eval mode."""
    cls = _class_for(original_class(module), method)  # type: ignore[arg-type]  # classes are hashable
    new = cls.__new__(cls)
    # The very dicts of tensors, not copies: whoever still holds the old leaf must see `.to()` and a loaded state.
    new.__dict__ = {**module.__dict__, "lean": lean}
    if children:
        new.__dict__["_modules"] = {**module._modules, **children}
    return new
