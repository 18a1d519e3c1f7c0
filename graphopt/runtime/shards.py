"""Tensors of which every rank holds a part (`DTensor`), next to ordinary ones; torch.distributed is imported only to cut one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_sharded(value: object) -> bool:
    """Whether each rank holds a part of a tensor."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, which shares memory with a sharded tensor; an ordinary tensor itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def local_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a tensor, which is sharded like `other`, or whole on every rank; no rank waits for another."""
    if is_sharded(tensor) or not is_sharded(other):
        return local(tensor)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    return local(distribute_tensor(tensor.detach(), sharded.device_mesh, sharded.placements, src_data_rank=None))


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on its device; an ordinary one itself. All ranks have to call it, for the same tensors in the same order."""
    sharded: Any = tensor.detach()
    gathered: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on the CPU; an ordinary tensor itself. All ranks have to call it, as `full`."""
    return full(tensor).cpu() if is_sharded(tensor) else tensor


def copied(value: Any) -> Any:
    """Nested dicts, lists and tuples with copies of all tensors, on the CPU; of a sharded tensor each rank copies its part."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: copied(item) for name, item in value.items()}
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else value


def whole_state(value: Any, *, keep: bool = True) -> Any:
    """Nested state dicts with every sharded tensor whole. All ranks have to call it; without `keep` one only takes part, and gets None."""
    if isinstance(value, Mapping):
        found = {name: whole_state(item, keep=keep) for name, item in value.items()}
        return found if keep else None
    value = whole(value) if isinstance(value, Tensor) else value
    return value if keep else None
