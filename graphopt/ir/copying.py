"""Copies of modules and nodes, without the detours of `copy.deepcopy` and `torch.fx`.

What a module holds is copied value by value: numbers, names, types and functions as they are, dictionaries, lists and tensors as new ones.
`copy.deepcopy` takes every module and every dictionary of hooks through the protocol of pickling, and generates the code of a graph
module anew. What has a way of its own to be copied still goes that way.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.ir.fakes import as_fake
from graphopt.runtime.body import Body, bodies

Replace = Callable[[Tensor], Tensor]

#: values of these types are never changed in place
_FIXED = frozenset((type(None), bool, int, float, complex, str, bytes, type, range, FunctionType, BuiltinFunctionType)) | {
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
}


def fake_copy(module: nn.Module, mode: FakeTensorMode, arrange: Replace = lambda tensor: tensor) -> Any:
    """A copy of `module` whose tensors are fakes of `mode`: structure without memory. `module` may be on any device, meta included.

    `arrange` may give a fake another layout.
    """

    def replaced(tensor: Tensor) -> Tensor:
        with mode:
            return arrange(as_fake(tensor, mode))

    copied = copy_with(module, replaced)
    for part in (p for root in (copied, *(body for _, body in bodies(copied))) for p in root.modules()):
        # A norm that averages all batches divides by the value of its counter, which a fake does not have. Any factor costs the same.
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.momentum is None:
            part.momentum = 0.1
    return copied


def real_copy(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy on the CPU to run in `dtype`. Buffers are its own; parameters read the memory of `module`'s where device and type allow it.

    So a forward and a backward leave `module` as it was, gradients included, but the copy is of use only as long as its values are.
    """
    memo: dict[int, Any] = {}

    def replaced(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # of a leaf that is called with other weights than its own
            return tensor
        kind = dtype if tensor.is_floating_point() else dtype.to_complex() if tensor.is_complex() else tensor.dtype
        values = tensor.detach().to("cpu", kind)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(values, tensor.requires_grad)
        # Buffers that are views of the same memory stay that.
        own = values if values.data_ptr() != tensor.data_ptr() else copy.deepcopy(values, memo)
        return own.requires_grad_(tensor.requires_grad)

    return copy_with(module, replaced)


def alias_copy(module: nn.Module) -> Any:
    """A copy whose tensors are new objects over the same memory: `requires_grad` is theirs alone, values are shared."""

    def aliased(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(tensor.detach(), tensor.requires_grad)
        return tensor.detach().requires_grad_(tensor.requires_grad)

    return copy_with(module, aliased)


def copy_node(graph: fx.Graph, node: Node, copies: Mapping[Node, Node]) -> Node:
    """A copy of `node` at the end of `graph`, which reads the `copies` of what `node` reads.

    `Graph.node_copy` gives the same, but searches all arguments for symbolic numbers, which takes as long as the rest.
    """
    copied = graph.create_node(node.op, node.target, (), {}, node.name, node.type)
    copied.args = map_arg(node.args, copies.__getitem__)
    if node.kwargs:
        copied.kwargs = map_arg(node.kwargs, copies.__getitem__)
    copied.meta.update(node.meta)
    return copied


def copy_with(module: nn.Module, replace: Replace | None = None) -> Any:
    """A copy of `module` with `replace(tensor)` for each tensor in it (default: a copy); tensors that were shared are shared again.

    That covers bodies of sections, and tensors that are attributes of a module (alone, or in lists, tuples and dictionaries). Graph
    modules are copied with the very graph and code that they have: the copy is for running, not for rewriting.
    """
    return _Copier(module, replace).value(module)


class _Copier:
    """One copy of `root`. `memo` is what `copy.deepcopy` calls so: from the identity of what was copied to its copy."""

    def __init__(self, root: nn.Module, replace: Replace | None) -> None:
        self.root, self.replace = root, replace
        self.memo: dict[int, Any] = {}
        #: what exists only for this copy must not lend its identity to anything else
        self._states: list[Any] = []
        self._complete = replace is None

    def value(self, value: Any) -> Any:
        """A copy of anything that a module holds."""
        kind = type(value)
        if kind in _FIXED:
            return value
        if (known := self.memo.get(id(value))) is not None:
            return known
        if kind in (dict, OrderedDict):
            items = self.memo[id(value)] = kind()
            items.update((self.value(k), self.value(v)) for k, v in value.items())
            return items
        if kind in (list, tuple) or (kind is set and all(type(item) in _FIXED for item in value)):
            copied = kind(map(self.value, value))
        elif isinstance(value, Tensor) and self.replace is not None:
            copied = self.replace(value)
        elif (state := _state_of(value)) is not None:
            return self._object(value, state)
        else:
            return self._in_its_own_way(value)
        self.memo[id(value)] = copied
        return copied

    def _object(self, value: Any, state: dict[str, Any]) -> Any:
        """An object that is what `state` says."""
        self._states.append(state)
        copied = self.memo[id(value)] = object.__new__(type(value))
        # Most of a module are numbers and empty dictionaries of hooks.
        own = {k: v if (kind := type(v)) in _FIXED else kind() if kind in _MAPPINGS and not v else self.value(v) for k, v in state.items()}
        if isinstance(value, fx.GraphModule) or not hasattr(value, "__setstate__"):
            vars(copied).update(own)
        else:
            copied.__setstate__(own)
        if isinstance(value, fx.GraphModule):
            vars(copied)["_graph"] = value.graph
        return copied

    def _in_its_own_way(self, value: Any) -> Any:
        """By `copy.deepcopy`, which finds the tensors of all modules replaced already: what it copies may lead to any of them."""
        if not self._complete:
            self._complete = True
            for part in (p for root in (self.root, *(body for _, body in bodies(self.root))) for p in root.modules()):
                for tensor in _tensors_of(part):
                    self.value(tensor)
        return copy.deepcopy(value, self.memo)


def _state_of(value: Any) -> dict[str, Any] | None:
    """The dictionary that makes an object what it is; None if a copy takes more than that."""
    kind = type(value)
    if isinstance(value, fx.GraphModule):
        # Its meta can hold fake tensors of another mode.
        return {k: v for k, v in vars(value).items() if k != "_graph"} | {"meta": {}}
    if not isinstance(value, (nn.Module, Body)) or hasattr(kind, "__deepcopy__"):
        return None
    if any(getattr(kind, name) is not getattr(object, name) for name in ("__reduce_ex__", "__reduce__")):
        return None
    state = value.__getstate__()
    return state if isinstance(state, dict) else None


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in items:
            if isinstance(item, Tensor):
                yield item


class LooseTensor(Exception):
    """A module holds a tensor that is neither a parameter nor a buffer."""


def outline(value: Any) -> Any:
    """A hashable description of a module or of what one holds: equal ones run alike, values of tensors aside.

    An object of a kind that is not known is equal to no other. Raises LooseTensor.
    """
    kind = type(value)
    if kind in _FIXED:
        return kind, value
    if isinstance(value, Tensor):
        return kind, value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        return kind, tuple([(name, _held(name, held)) for name, held in vars(value).items() if type(held) not in _MAPPINGS or held])
    if kind in (list, tuple, set, frozenset):
        return kind, tuple(map(_apart_from_tensors, value))
    if kind in _MAPPINGS:
        return kind, tuple((k, _apart_from_tensors(v)) for k, v in value.items())
    return object()


#: most of what a module holds are empty dictionaries of hooks
_MAPPINGS = (dict, OrderedDict)


def _held(name: str, value: Any) -> Any:
    if name in ("_parameters", "_buffers"):
        return tuple([(key, outline(tensor)) for key, tensor in value.items()])
    return _apart_from_tensors(value)


def _apart_from_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        raise LooseTensor
    return outline(value)
