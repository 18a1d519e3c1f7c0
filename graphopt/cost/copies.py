"""Copies of a module to run a step on: one without memory (fake CPU tensors), one with."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import CostError
from graphopt.ir.shapes import as_fake, copy_with


def fake_cpu_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module over fake CPU tensors of `mode`, wherever it is; nothing is allocated."""
    return _copy(module, lambda tensor: as_fake(tensor, mode))


def real_cpu_copy(module: nn.Module) -> nn.Module:
    """The same module over CPU tensors of its own, without gradients.

    Raises:
        CostError: a tensor has no values (the meta device).
    """

    def own(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            raise CostError("a module on the meta device has no values to run", fix="Build it on the CPU to measure it")
        values = tensor.detach().to("cpu", copy=True)
        return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    return _copy(module, own)


def _copy(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Any:
    try:
        return copy_with(module, replace)
    except CostError:
        raise
    except Exception as error:
        raise CostError(f"the module cannot be copied: {error}", fix="copy.deepcopy(module) must work") from error
