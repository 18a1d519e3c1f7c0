"""Shapes of every node, found by running the graph on fake tensors."""

import copy
import functools
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, unset_fake_temporarily
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from graphopt.errors import TraceError, first_line
from graphopt.ir.copying import LooseTensor, fake_copy, outline
from graphopt.ir.fakes import FakeMode, new_fake
from graphopt.ir.inputs import Input, dtype_of, samples, show, tensors_of

#: shapes are propagated at this batch, so that a batch dimension is never mistaken for one of size 1
SHAPE_BATCH = 2

#: an image of fewer positions is small: what a run takes on it is the time of its calls
FEW_POSITIONS = 64 * 64


def propagate_shapes(module: fx.GraphModule, input: Input, batch: int = SHAPE_BATCH) -> None:
    """Stamps `meta["val"]` on every node of `module` by running it on fake tensors, without gradients and without weights.

    Raises TraceError if the graph cannot take this input; names the node and its module path.
    """
    mode = FakeMode()
    # Of the module only what its graph calls and reads: a copy of the graph itself would be compiled.
    root = nn.Module()
    root.__dict__.update({name: module.__dict__[name] for name in ("_parameters", "_buffers", "_modules")})
    fake = fake_copy(root, mode).eval()
    with uncached(module), mode:
        given = samples(input, batch, functools.partial(torch.empty, dtype=dtype_of(fake)))
        at: list[fx.Node] = []

        class Shapes(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                return super().call_function(target, _literal(args), _literal(kwargs))

            def run_node(self, n: fx.Node) -> Any:
                at[:] = [n]
                try:
                    value = super().run_node(n)
                except (DataDependentOutputException, DynamicOutputShapeException):
                    value = _shape_by_running(module, n, *self.fetch_args_kwargs_from_env(n), mode)
                n.meta["val"] = value
                return value

        try:
            with torch.no_grad():
                Shapes(fake, graph=module.graph).run(*given)
        except Exception as error:
            node = at[0] if at else None
            origin = node.meta.get("origin") if node is not None else None
            where = f"node {node} of {(origin.path if origin else '') or 'the backbone'}" if node is not None else None
            cause = error.__cause__ or error
            what = f"the graph cannot take an input of shape {show(input)}: {first_line(cause)}"
            fix = "Give the input shape that the backbone was built for ([backbone] input, and its image size argument)"
            raise TraceError(what, where=where, fix=fix) from error


def update_shapes(module: fx.GraphModule, stale: Collection[fx.Node]) -> bool:
    """Works out the values again of nodes that are `stale` or have none, and of all that reads one which looks different now.

    Returns False, with values missing, where that cannot be done node by node: `propagate_shapes` then does it, or says why it cannot.
    """
    first = next(iter(module.graph.find_nodes(op="placeholder")))
    mode = getattr(first.meta.get("val"), "fake_mode", None)
    if mode is None:
        return False
    renewed = set[fx.Node]()
    taken = set[int]()
    with uncached(module):
        for node in module.graph.nodes:
            if node in stale or "val" not in node.meta or not renewed.isdisjoint(node.all_input_nodes):
                old = node.meta.pop("val", None)
                # Which nodes share a parameter's memory is told by one copy of the whole module alone.
                if node.op == "get_attr":
                    return False
                try:
                    new = value_of(module, node, mode)
                except Exception:
                    return False
                node.meta["val"] = old if (same := _looks_like(new, old, taken)) else new
                if not same:
                    renewed.add(node)
            taken.update(t.untyped_storage()._cdata for t in tensors_in(node.meta["val"]))
    return True


def value_of(module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    """What a node gives for the fake values of its inputs, in eval mode and without a gradient. Raises what it raises."""
    args, kwargs = map(_literal, fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"]))
    function: Any = node.target
    if node.op == "output":
        return args[0]
    if node.op == "call_method":
        function = getattr(type(args[0]), function)
    elif node.op == "call_module":
        return _value_of_leaf(module.get_submodule(function), args, kwargs, mode)
    with mode, torch.no_grad():
        return function(*args, **kwargs)


#: from a leaf and its one input, described, to shape, strides and type of the new tensor that it gives; at most so many
_results: dict[Any, tuple[Any, ...]] = {}
MOST_RESULTS = 10_000


def _value_of_leaf(leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    """What a leaf gives; of leaves that are alike, with inputs that are alike, one is run."""
    key = None
    with suppress(LooseTensor, TypeError):  # TypeError: no hash
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            key = (torch.get_default_dtype(), outline(leaf), outline(args[0]), args[0].storage_offset())
            if (known := _results.get(key)) is not None:
                with unset_fake_temporarily():
                    return new_fake(mode, *known)
    function = fake_copy(leaf, mode).eval()
    with mode, torch.no_grad():
        value = function(*args, **kwargs)
    if key is not None and len(_results) < MOST_RESULTS and _is_new(value, args[0]):
        _results[key] = (value.shape, value.stride(), value.dtype)
    return value


def _is_new(value: Any, given: torch.Tensor) -> bool:
    """Whether a value is a tensor that has memory of its own, all of it."""
    if not isinstance(value, torch.Tensor) or value.untyped_storage()._cdata == given.untyped_storage()._cdata:
        return False
    return bool(value.storage_offset() == 0 and value.untyped_storage().nbytes() == value.numel() * value.element_size())


def _looks_like(new: Any, old: Any, taken: set[int]) -> bool:
    """Whether a value can stay what it was: the same one, or two tensors alike, each in memory of its own (`taken` is that of others)."""
    if new is old:
        return True
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return False
    alike = (new.shape, new.stride(), new.dtype, new.storage_offset()) == (old.shape, old.stride(), old.dtype, old.storage_offset())
    return alike and taken.isdisjoint((new.untyped_storage()._cdata, old.untyped_storage()._cdata))


def is_large(input: Input) -> bool:
    """Whether the first input is an image of so many positions that a run on it takes longer than its calls."""
    image, dtype = tensors_of(input)[0]
    return dtype is None and len(image) == 3 and image[1] * image[2] > FEW_POSITIONS


def smaller_input(nodes: Iterable[fx.Node], input: Input) -> Input | None:
    """A smaller image, the first input: the smallest plane of activations of several positions is two of them wide or high.

    None where that is not smaller, the sample is no image, or it has few positions anyway. Not every backbone takes it (position
    embeddings have one size): running it tells. `nodes` have their shapes.
    """
    if not is_large(input):
        return None
    values = (n.meta.get("val") for n in nodes)
    widths = [size for v in values if isinstance(v, torch.Tensor) and v.dim() == 4 for size in v.shape[2:] if size > 1]
    smallest = min(widths, default=2)
    (image, _), *others = tensors_of(input)
    channels, *sizes = image
    if smallest <= 2:
        return None
    smaller = (channels, *(-(-2 * size // smallest) for size in sizes))
    return (smaller, *input[1:]) if others else smaller


def forward_bytes(module: fx.GraphModule) -> int:
    """The most memory that the values of a graph with shapes take at once in a forward pass without gradients."""
    last = {i: node for node in module.graph.nodes for i in node.all_input_nodes}
    held: dict[fx.Node, int] = {}
    live = most = 0
    for node in module.graph.nodes:
        held[node] = sum(t.numel() * t.element_size() for t in tensors_in(node.meta.get("val")))
        live += held[node]
        most = max(most, live)
        live -= sum(held[i] for i in {*node.all_input_nodes, node} if last.get(i, i) is node)
    return most


def _literal(value: Any) -> Any:
    """The graph's own lists and dictionaries as generated code has them: literals, which a function may change."""
    if type(value) in (tuple, immutable_list):
        return (tuple if type(value) is tuple else list)(map(_literal, value))
    return {k: _literal(v) for k, v in value.items()} if type(value) in (dict, immutable_dict) else value


def _shape_by_running(module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Shapes of a leaf that branches on values: they cannot be known without values, so it runs once on random ones."""
    if node.op != "call_module":
        raise TypeError(f"{node} branches on values outside any module")
    with unset_fake_temporarily():
        leaf = copy.deepcopy(module.get_submodule(str(node.target))).eval()
    if any(t.is_meta for t in (*leaf.parameters(), *leaf.buffers())):
        raise TypeError(f"{node.target} branches on values: its shapes are not known without its weights")

    def real(value: Any) -> Any:
        return torch.rand(value.shape).to(value.dtype) if isinstance(value, torch.Tensor) else value

    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        args, kwargs = pytree.tree_map(real, (args, kwargs))
        out = leaf(*args, **kwargs)
    return pytree.tree_map(lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, out)


@contextmanager
def uncached(module: nn.Module) -> Iterator[None]:
    """Inside, no function of the model's Python files knows what it cached before; afterwards, none what it cached inside.

    So no tensor without values reaches a real run, and a step costs the same whatever ran before it.
    """
    files = {type(part).__module__ for part in module.modules()}
    own = [vars(sys.modules[file]) for file in files if file in sys.modules and file.partition(".")[0] not in ("torch", "graphopt")]

    def clear() -> None:
        for names in own:
            for cached in _caches_in(names.values()):
                cached.cache_clear()

    clear()
    try:
        yield
    finally:
        clear()


def _caches_in(values: Iterable[Any]) -> Iterator[Any]:
    """Functions under `functools.lru_cache` or `cache`, also where another decorator wraps them, or a class of the file holds them."""
    for value in values:
        if isinstance(value, functools._lru_cache_wrapper):
            yield value
        elif isinstance(value, FunctionType):
            held = inspect.getclosurevars(value).nonlocals.values() if value.__closure__ else ()
            yield from (inner for inner in held if isinstance(inner, functools._lru_cache_wrapper))
        elif isinstance(value, type) and issubclass(value, nn.Module):
            yield from _caches_in(inner for inner in vars(value).values() if not isinstance(inner, type))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists, dictionaries (of any subclass) and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
