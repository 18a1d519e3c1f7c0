"""Copies of a module to run a step on: one without memory (fake CPU tensors), one with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.cost.errors import CostError


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module over fake CPU tensors of `mode`. `module` may be on the meta device, on a GPU, or real; it is not touched.

    Parameters keep their sharing and `requires_grad`. Nothing is allocated.
    """

    def stand_in(tensor: Tensor) -> Tensor:
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    return _copy(module, stand_in)


def real_copy(module: nn.Module) -> nn.Module:
    """The same module over CPU tensors of its own, gradients left behind.

    Raises CostError where a tensor has no values (the meta device).
    """

    def own(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            raise CostError("a module on the meta device has no values to run", fix="Build it on the CPU to measure it")
        values = tensor.detach().to("cpu", copy=True)
        return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    return _copy(module, own)


def bodies(module: nn.Module) -> Iterator[tuple[nn.Module, fx.GraphModule]]:
    """Graph modules that `module`'s submodules hold without registering them (sections' bodies), each with its holder; nested ones too."""
    seen: set[int] = set()
    queue: list[nn.Module] = [module]
    while queue:
        for holder in queue.pop().modules():
            for value in vars(holder).values():
                body = getattr(value, "module", None)
                if isinstance(body, fx.GraphModule) and not isinstance(value, nn.Module) and id(body) not in seen:
                    seen.add(id(body))
                    queue.append(body)
                    yield holder, body


def _copy(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    # deepcopy asks the memo before it copies: what is in there stands in for the original wherever it is shared.
    memo: dict[int, Any] = {}
    for owner in (module, *(body for _, body in bodies(module))):
        for part in owner.modules():
            for tensor in _tensors(part):
                if id(tensor) not in memo:
                    memo[id(tensor)] = replace(tensor)
    try:
        return copy.deepcopy(module, memo)
    except CostError:
        raise
    except Exception as error:
        raise CostError(f"the module cannot be copied: {error}", fix="copy.deepcopy(module) must work") from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))
