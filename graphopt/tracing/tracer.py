"""`nn.Module` -> flat `fx.Graph`, with the shapes of everything known while Python runs.

Every proxy knows the value that its node has on the meta device. What is a Python number then, and does not depend on the batch, is given
to the backbone's code as that number; so asserts on shapes, padding, loops over sizes, unpacking and `isinstance(x, Tensor)` trace as they
run. Sizes that depend on the batch stay nodes, and so the batch stays free. So does a tensor's device, which follows the input: a branch
on it (`if x.is_cuda`) is taken as on the backbone's device now, wherever the graph runs later.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from graphopt.errors import TraceError
from graphopt.ir.inputs import Input, dtype_of, samples, tensors_of
from graphopt.runtime.loaded import loaded
from graphopt.tracing.autocast import Contexts, counted
from graphopt.tracing.batch import BATCH, Shape, depends_on_batch, replaced_len, same_for_any_batch
from graphopt.tracing.same_shape import keeps_shape, layer_keeps_shape

#: containers of torch.nn that only call their children, so that blocks can be found inside
_TRACED_CONTAINERS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_UNKNOWN = object()
#: functions that take sizes one by one, so that torch does not see that one of them is a node
_FACTORIES: tuple[Any, ...] = (torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.arange, torch.eye)
#: what a forward asks about a type, which is a node where it is a tensor's
_TYPE_FACTS: tuple[Any, ...] = (torch.finfo, torch.iinfo)
#: methods and functions that ask a tensor for a number: what they give is looked at at once, everything else when it is needed
_QUERIES = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size"})
_QUERIES |= {"is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg"}
_ATTRIBUTES = frozenset({"ndim", "is_nested", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_quantized", "layout", "itemsize", "names"})
#: where a tensor lies: nodes, which follow the input to any device; where Python decides by them, that is decided as on the trace's device
_DEVICES = frozenset({"device", "get_device", "is_cpu", "is_cuda", "is_hpu", "is_ipu", "is_maia"})
_DEVICES |= {"is_meta", "is_mps", "is_mtia", "is_vulkan", "is_xla", "is_xpu"}
_QUERY_FUNCTIONS: tuple[Any, ...] = (torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor)
#: what nothing needs once a question about sizes is answered
_ASKED: tuple[Any, ...] = ("size", "get_device", operator.mul, operator.floordiv)


class ValueProxy(fx.Proxy):
    """A proxy that knows its value on the meta device, where there is one."""

    tracer: Tracer

    @property
    def value(self) -> Any:
        """What the node gives on the meta device; `_UNKNOWN` where that takes real ones."""
        return self.tracer.value_of(self.node)

    @property  # type: ignore[misc]  # read-only, so that isinstance(x, Tensor) is true in a backbone's forward
    def __class__(self) -> Any:
        return Tensor if isinstance(self.value, Tensor) else type(self)

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, Tensor):
            if name == "shape":
                return self.tracer.shape_of(self, value)
            if name in _ATTRIBUTES:
                return getattr(value, name)
        if name in ("_is_param", "_is_buffer"):
            return False
        return super().__getattr__(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and isinstance(self.value, Tensor):
            raise TraceError(
                f"the backbone's forward reads {key!r} of a tensor: it takes a dictionary, not an image",
                where=type(self.tracer.root).__name__,
                fix="Wrap it so that forward(x) takes the image",
            )
        return super().__getitem__(key)  # type: ignore[misc]  # fx adds it to the class later

    def __setitem__(self, key: Any, value: Any) -> None:
        """`x[:, 0] = value` writes into a view of the tensor. Chosen elements (`x[mask] = value`) are no view, and cannot be traced."""
        keys = key if isinstance(key, tuple) else (key,)
        if any(k is not None and type(k) not in (int, slice, type(...)) for k in keys):
            raise fx.proxy.TraceError("it assigns to elements of a tensor that an index tensor chooses: use torch.where or masked_fill")
        view: Any = self[key]
        if isinstance(value, Tensor) or issubclass(type(value), fx.Proxy):
            view.copy_(value)
        else:
            view.fill_(value)

    def __len__(self) -> int:
        length = _length(self.value)
        if length is None:
            raise fx.proxy.TraceError("it asks for the length of something that is not known before it runs: for a batch, use x.shape[0]")
        return length

    def __index__(self) -> int:
        if type(self.value) is int and not depends_on_batch(self.value):
            return int(self.value)
        raise fx.proxy.TraceError("it needs a size that depends on the batch, or what a tensor holds, as a number: int(...), range(...)")

    __int__ = __index__


class Tracer(fx.Tracer):
    """Traces through containers and stops at leaves.

    A leaf is a `torch.nn` layer, a module that timm or torchvision registers as one, a childless module whose own forward asks
    for `self.training` (it must stay a module to follow the mode), or a path that the caller calls opaque.

    Args:
        input: shape of one sample, of each input.
        meta: gives a copy of the backbone on the meta device, to find shapes with.
        opaque: module paths to keep whole because they cannot be traced, or differ by mode.
    """

    def __init__(self, input: Input, meta: Callable[[], nn.Module], opaque: Iterable[str] = ()) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=(*_library_functions(), *_FACTORIES, *_TYPE_FACTS))
        self._autowrap_search.append(torch)
        with torch.device("meta"):
            torch.empty(0)  # torch lists its factories when a device is first set: that must not be while they are wrapped
        self.proxy_buffer_attributes = True
        self.input, self.opaque = input, frozenset(opaque)
        self._registered: tuple[type[nn.Module], ...] = (*_library_leaves(), torch.jit.ScriptModule)
        self._meta = meta
        #: a tensor on the device that the backbone is on
        self._here = torch.empty(0)
        #: while a node is evaluated, nothing is recorded
        self._evaluating = False
        #: what each node gives on the meta device
        self.values: dict[Node, Any] = {}
        #: nodes made under `torch.no_grad()`
        self._without_gradient: set[Node] = set()
        self._autocasts = Contexts(lambda: not self._evaluating)
        #: path of the innermost module whose forward raised, after a failed trace.
        self.failed: str | None = None
        #: path of the innermost module whose forward drew from Python's generator
        self.drew: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or isinstance(m, self._registered):
            return True
        if type(m) in _TRACED_CONTAINERS:
            return False
        return super().is_leaf_module(m, module_qualified_name) or _asks_for_mode(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        before = random.getstate()
        try:
            result = super().call_module(m, forward, args, kwargs)
            if self.drew is None and random.getstate() != before:
                self.drew = self.path_of_module(m)
            return result
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The first arguments of the root's forward are the inputs; all others keep their defaults."""
        self.names = input_names(self.root, len(tensors_of(self.input)))
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self.names)]

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.failed = self.drew = None
        self._autocasts.open = 0
        first = next((t for t in (*root.parameters(), *root.buffers()) if not t.is_meta), None)
        self._here = torch.empty(0, device=None if first is None else first.device)
        before = random.getstate()
        with counted(self._autocasts), replaced_len(root, self._len):
            graph = super().trace(root, concrete_args)
        if random.getstate() != before and self.drew is None:
            self.drew = ""
        self._detach_what_has_no_gradient(graph)
        for node in reversed(list(graph.nodes)):
            # With this mark, the graph's code would change what fx does in every later trace.
            node.meta.pop("is_wrapped", None)
            # Sizes that nothing needed, questions about types and devices that were answered, and tensors that were read for those.
            asked = node.target in _ASKED or isinstance(self.values.get(node), (bool, str, torch.dtype, torch.device))
            if not node.users and (node.op == "get_attr" or (asked and node.op in ("call_function", "call_method"))):
                graph.erase_node(node)
        return graph

    def _len(self, value: Any) -> Any:
        """What `len` gives a forward: of a batch its size, a node."""
        if issubclass(type(value), fx.Proxy) and isinstance(known := self.value_of(value.node), Tensor) and known.dim():
            return self.shape_of(value, known)[0]
        return len(value)

    def _detach_what_has_no_gradient(self, graph: fx.Graph) -> None:
        """A graph has no `torch.no_grad()`: what left one is detached instead, wherever it is read outside."""
        for node in list(graph.nodes):
            readers = [u for u in node.users if u not in self._without_gradient]
            if node in self._without_gradient and readers:
                with graph.inserting_after(node):
                    detached = graph.call_method("detach", (node,))
                detached.meta = dict(node.meta)
                node.replace_all_uses_with(detached, delete_user_cb=lambda user, readers=readers: user in readers)

    def proxy(self, node: Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # A proxy claims to be a Tensor: it must not be taken for a constant.
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        node = proxy.node
        computes = kind in ("call_function", "call_method", "call_module")
        if computes and self._autocasts.open:
            raise TypeError("its forward sets autocast, and a graph has no such context")
        if computes and not torch.is_grad_enabled() and isinstance(value := self.value_of(node), Tensor) and value.is_floating_point():
            self._without_gradient.add(node)
        if not (kind == "call_method" and target in _QUERIES) and not (kind == "call_function" and target in _QUERY_FUNCTIONS):
            return proxy
        value = self.value_of(node)
        if isinstance(value, torch.Size):
            source = node.all_input_nodes[0]
            self.graph.erase_node(node)
            return self.shape_of(self.proxy(source), self.value_of(source))
        if isinstance(value, (bool, int, tuple)) and not depends_on_batch(value):
            self.graph.erase_node(node)
            return value
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A comparison of types or devices is answered; they are no constants, because a module can be cast or moved after tracing."""
        value, open_ = self.value_of(obj.node), [obj.node]
        while isinstance(value, bool) and open_:
            node = open_.pop()
            asked = node.args[1] if node.target is getattr else node.target
            if asked == "dtype" or asked in _DEVICES:
                continue
            if same_for_any_batch(node.target, [self.values[a] if isinstance(a, Node) else a for a in node.args]):
                continue
            known = self.values[node]
            if not node.all_input_nodes or not isinstance(known, (bool, int, str, torch.dtype)) or depends_on_batch(known):
                return super().to_bool(obj)
            open_ += node.all_input_nodes
        return value if isinstance(value, bool) else super().to_bool(obj)

    def shape_of(self, proxy: fx.Proxy, value: Tensor) -> Shape:
        """The shape of a tensor: numbers, and nodes where a size depends on the batch."""
        sizes = enumerate(value.shape)
        return Shape(self.create_proxy("call_method", "size", (proxy, i), {}) if depends_on_batch(s) else s for i, s in sizes)

    def iter(self, obj: Any) -> Iterator[Any]:
        value = self.value_of(obj.node)
        length = None if isinstance(value, dict) else _length(value)
        return super().iter(obj) if length is None else (obj[i] for i in range(length))

    def value_of(self, node: Node) -> Any:
        """What a node gives on the meta device; `_UNKNOWN` where that takes real ones. Evaluates what leads to it, each node once."""
        if node not in self.values:
            state, stack = random.getstate(), [node]
            while stack:
                missing = [i for i in stack[-1].all_input_nodes if i not in self.values]
                if missing:
                    stack += missing
                else:
                    done = stack.pop()
                    self.values[done] = self._evaluate(done)
            random.setstate(state)
        return self.values[node]

    def _evaluate(self, node: Node) -> Any:
        def fake(argument: Any) -> Any:
            if isinstance(argument, Node):
                known = self.values[argument]
                if (
                    getattr(node.target, "__module__", "") == "_operator"
                    and isinstance(known, (str, torch.device))
                    and str(known) == "meta"
                ):
                    known = self._here.device if isinstance(known, torch.device) else self._here.device.type
                return known
            return list(argument) if isinstance(argument, list) else argument

        if any(self.values[i] is _UNKNOWN for i in node.all_input_nodes):
            return _UNKNOWN
        self._evaluating = True
        try:
            with torch.device("meta"), torch.no_grad():
                return self._run(node, *fx.node.map_aggregate((node.args, node.kwargs), fake))
        except Exception:  # not to be known without values; if the node is at fault, running it on the real shapes will say so
            return _UNKNOWN
        finally:
            self._evaluating = False

    def _run(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            given = samples(self.input, BATCH, functools.partial(torch.empty, dtype=dtype_of(self.root)))
            return given[self.names.index(str(node.target))]
        if node.op == "call_module":
            module = self._meta().get_submodule(str(node.target))
            return args[0] if layer_keeps_shape(module) else module(*args, **kwargs)
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(self.root)
            return value.to("meta") if isinstance(value, Tensor) else value
        if node.op == "call_method":
            owner = self._here if node.target == "get_device" else args[0]
            return getattr(owner, str(node.target))(*args[1:], **kwargs)
        if node.target is getattr and args[1] in _DEVICES - {"device"}:
            return getattr(self._here, args[1])
        function: Any = node.target
        return args[0] if keeps_shape(function, args) else function(*args, **kwargs)


def meta_copy(root: nn.Module) -> nn.Module:
    """A deep copy without memory."""
    memo: dict[int, Any] = {}
    for tensor in (*root.parameters(), *root.buffers()):
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(root, memo)


def _length(value: Any) -> int | None:
    """How many items a value has; None where that is not known, or depends on the batch."""
    known = isinstance(value, (tuple, list, dict)) or (isinstance(value, Tensor) and value.dim() and not depends_on_batch(value.shape[0]))
    return len(value) if known else None


def _library_functions() -> tuple[Callable[..., Any], ...]:
    """Functions that become calls: those that timm registers, and those of einops, which look into their argument's type."""
    registered = (name for get in loaded("timm.layers._fx", "get_notrace_functions") for name in get() if callable(name))
    return (*registered, *loaded("einops", "rearrange", "reduce", "repeat", "einsum", "pack", "unpack"))


def _library_leaves() -> tuple[type[nn.Module], ...]:
    """Modules whose forward branches on data or on the mode, as timm registers them, and torchvision's."""
    registered = (leaf for get in loaded("timm.layers._fx", "get_notrace_modules") for leaf in get())
    return (*registered, *loaded("torchvision.ops", "StochasticDepth", "FrozenBatchNorm2d"))


def input_names(module: nn.Module, count: int) -> list[str]:
    """What the inputs of a graph are called: the first `x`, the others as the forward of the module calls them.

    Raises TraceError if it cannot take so many inputs, or if they are not enough.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    several = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    keyword = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    named = [p for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is inspect.Parameter.empty for p in named)
    if required > count or any(p.default is inspect.Parameter.empty for p in keyword) or (count > len(named) and not several):
        needed = required + sum(p.default is inspect.Parameter.empty for p in keyword)
        most = "" if several else f" of at most {len(named)}"
        raise TraceError(
            f"the backbone's forward takes {needed} required inputs{most}, the shape of {count} was given",
            where=type(module).__name__,
            fix="In Python, give the shape of each: graphopt.compile(model, passes, input=((3, 224, 224), (8,))). "
            "For a spec and `graphopt train`, which give one image, wrap it so that forward(x) is enough",
        )
    taken = {"x", "target", "features"}  # what emitted modules call their own inputs
    names = ["x"]
    for number in range(1, count):
        name = named[number].name if number < len(named) else f"x_{number}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a childless module's own forward reads `self.training` (DropPath, a user's noise layer)."""
    if next(module.children(), None) is not None:
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def constants_of(root: nn.Module, graph: fx.Graph, own: set[str]) -> dict[str, torch.Tensor]:
    """Tensors that tracing had to park on `root` (`_tensor_constant0`), by name; `own` are the names it had before."""
    names = [n.target for n in graph.nodes if n.op == "get_attr" and "." not in n.target and n.target not in own]
    return {name: value for name in names if isinstance(value := getattr(root, name), Tensor)}
