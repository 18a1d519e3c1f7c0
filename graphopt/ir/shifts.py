"""Which activations move with the image: those that layers compute alike at every position, as convolutions do.

Moving the image by a multiple of an activation's stride then moves the activation by whole positions, and nothing else changes but what
lies near the borders, where convolutions read their padding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import PassError, first_line
from graphopt.ir.copying import fake_copy
from graphopt.ir.fakes import FakeMode
from graphopt.ir.flow import ancestors
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import crop_padding, dtype_of, image_of, show
from graphopt.ir.shapes import SHAPE_BATCH, tensors_in, uncached

aten = torch.ops.aten
Image = tuple[int, int, int]


class Moving(NamedTuple):
    """An activation that moves with the image: its stride in pixels, down and to the right, and the shape that one sample has."""

    stride: tuple[int, int]
    shape: tuple[int, ...]


def moving(graph: Graph, node: Node, image: Image | None = None) -> Moving:
    """How an activation (N, C, H, W) moves with the image, for images of the backbone's own shape (C, H, W), or of another one.

    Raises PassError where it does not; names the first operation that is to blame.
    """
    own = image_of(graph.input)
    if own is None:
        raise PassError(f"the backbone takes {show(graph.input)}, no image that could be moved")
    mode, at = FakeMode(), list[Node]()
    inside = ancestors([node])

    class Run(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            if n not in inside:
                return None
            at[:] = [n]
            return super().run_node(n)

    with uncached(graph.module), mode, torch.no_grad():
        fake = fake_copy(graph.module, mode).eval()
        x = torch.empty(SHAPE_BATCH, *(image or own), dtype=dtype_of(fake))
        watch = _Watch(x)
        run = Run(fake, garbage_collect_values=False, graph=graph.fx)
        try:
            with watch:
                run.run(x)
        except _Fixed as fixed:
            raise PassError(fixed.why, where=_place(at[0])) from None
        except Exception as error:
            what = f"an image of {show(image or own)} cannot be followed through it: {first_line(error.__cause__ or error)}"
            raise PassError(what, where=_place(at[0])) from error
    found = watch.maps.get(id(value := run.env[node]))
    if found is None or [_names(dim) for dim in found.dims] != ["n", "", "y", "x"]:
        raise PassError("what is computed here is no map (N, C, H, W)", where=_place(node))
    return Moving(found.stride, tuple(value.shape[1:]))


class Croppable(NamedTuple):
    """The map from which random crops are taken in the place of an activation: that of a larger image.

    Attributes:
        shape: (C, H, W) of the larger map. pixels: by how many rows and columns the image is larger, on both sides together.
    """

    shape: tuple[int, int, int]
    pixels: tuple[int, int]


def croppable(graph: Graph, node: Node) -> Croppable:
    """What has to be cached of an activation (N, C, H, W) so that its crops are those of images which are padded and cropped at random.

    A crop of the image by a multiple of the stride is a crop of the map, exact up to what layers read beyond the borders of the crop: there
    they read the image, and its padding, instead of their own padding. Raises PassError where the activation does not move with the image,
    or by fewer pixels than one position of the map.
    """
    found = moving(graph, node)
    image = image_of(graph.input)
    assert image is not None
    padding = crop_padding(image)
    rows, columns = (2 * (padding // stride * stride) for stride in found.stride)
    if not rows and not columns:
        what = f"crops move an image of {image[1]}x{image[2]} by {padding} pixels at most, and the map has a stride of {min(found.stride)}"
        raise PassError(what, where=_place(node))
    larger = moving(graph, node, (image[0], image[1] + rows, image[2] + columns))
    grown = tuple((large - small) * stride for large, small, stride in zip(larger.shape[1:], found.shape[1:], found.stride, strict=True))
    if larger.stride != found.stride or grown != (rows, columns):
        raise PassError("a larger image has no map of which the image's own is a crop", where=_place(node))
    channels, height, width = larger.shape
    return Croppable((channels, height, width), (rows, columns))


def _place(node: Node) -> str:
    origin = node.meta.get("origin")
    return f"node {node}" + (f" of {origin.path}" if origin and origin.path else "")


class _Fixed(Exception):
    """An operation treats positions differently; `why` says which and how: a graph's interpreter adds to an exception's own text."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Part(NamedTuple):
    """A part of a dimension: samples "n", rows "y", columns "x", or anything else ""."""

    name: str
    size: int


_Dim = tuple[_Part, ...]


@dataclass(frozen=True)
class _Map:
    """What each dimension of a tensor counts, and the pixels from one row and column to the next."""

    dims: tuple[_Dim, ...]
    stride: tuple[int, int]

    def plain(self, dim: int) -> bool:
        """Whether neither samples nor positions lie in a dimension."""
        return not _names(self.dims[dim])


def _names(dim: _Dim) -> str:
    return "".join(part.name for part in dim)


def _plain(size: int) -> _Dim:
    return (_Part("", size),)


def _sized(found: _Map, result: Tensor) -> _Map:
    """The same dimensions, of the sizes that a result has; none of them is made of several parts whose sizes have changed."""
    dims = tuple(
        dim if math.prod(part.size for part in dim) == size else (dim[0]._replace(size=size),)
        for dim, size in zip(found.dims, result.shape, strict=True)
    )
    return replace(found, dims=dims)


class _Watch(TorchDispatchMode):
    """Notes of every tensor that is computed from the image what its dimensions count."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        names = zip(("n", "", "y", "x"), image.shape, strict=True)
        self.maps = {id(image): _Map(tuple((_Part(*part),) for part in names), (1, 1))}
        self._alive: list[Any] = [image]  # an address must not be given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors_in([*args, *kwargs.values()])
        if tensors_in(result) and any(id(tensor) in self.maps for tensor in given):
            call = _Call(func.overloadpacket, args, kwargs, result, self.maps)
            for tensor, found in zip(tensors_in(result), _judged(call, func.tags, given), strict=False):
                self.maps[id(tensor)] = found
        self._alive.append(result)
        return result


class _Call(NamedTuple):
    """An operator, with its arguments, its result, and what is known of tensors."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    maps: Mapping[int, _Map]

    @property
    def name(self) -> str:
        return str(self.operator).rpartition(".")[2].strip("_")

    def map(self, number: int = 0) -> _Map:
        """Of an argument that is a tensor. Raises _Fixed if it does not come from the image."""
        found = self.maps.get(id(self.args[number]))
        if found is None:
            raise _Fixed(f"{self.name} computes with the image where positions are not told apart")
        return found

    def argument(self, number: int, default: Any) -> Any:
        return self.args[number] if len(self.args) > number else default


def _judged(call: _Call, tags: Sequence[torch.Tag], given: Sequence[Tensor]) -> list[_Map]:
    """What the results' dimensions count. Raises _Fixed if positions are not treated alike."""
    rule = _RULES.get(call.operator)
    if rule is not None:
        found = rule(call)
        return [found] * len(tensors_in(call.result))
    if torch.Tag.pointwise in tags or call.operator in _ELEMENTWISE:
        return [_together(call, given)]
    raise _Fixed(f"{call.name} is not known to treat all positions alike")


def _together(call: _Call, given: Sequence[Tensor]) -> _Map:
    """Of an elementwise operator, with broadcasting."""
    maps = [(tensor, call.maps[id(tensor)]) for tensor in given if id(tensor) in call.maps]
    if len({found.stride for _, found in maps}) > 1:
        raise _Fixed(f"{call.name} joins activations of different strides")
    dims: list[_Dim] = []
    for back in range(call.result.ndim, 0, -1):
        found = {found.dims[-back] for tensor, found in maps if tensor.ndim >= back and tensor.shape[-back] > 1}
        own = [t for t in given if id(t) not in call.maps and t.ndim >= back and t.shape[-back] > 1]
        if len(found) > 1:
            raise _Fixed(f"{call.name} joins activations whose dimensions count different things")
        dim = next(iter(found)) if found else _plain(call.result.shape[-back])
        if own and ("y" in _names(dim) or "x" in _names(dim) or (not found and back <= 2)):
            raise _Fixed(f"{call.name} brings values of its own to each position")
        dims.append(dim)
    return _Map(tuple(dims), maps[0][1].stride)


def _window(call: _Call, stride: Any, out: int | None = None) -> _Map:
    """Of an operator that slides a window over (N, C, H, W)."""
    found = call.map()
    if [_names(dim) for dim in found.dims] != ["n", "", "y", "x"]:
        raise _Fixed(f"{call.name} does not slide over rows and columns")
    steps = tuple(stride) * (2 if len(stride) == 1 else 1)
    dims = (found.dims[0], found.dims[1] if out is None else _plain(out), *found.dims[2:])
    result = tensors_in(call.result)[0]
    return replace(_sized(_Map(dims, found.stride), result), stride=(found.stride[0] * steps[0], found.stride[1] * steps[1]))


def _convolution(call: _Call) -> _Map:
    if call.args[6]:
        raise _Fixed("a transposed convolution has several positions for one of the image")
    if id(call.args[1]) in call.maps:
        raise _Fixed("the weights of a convolution are computed from the image")
    return _window(call, call.args[3], out=call.args[1].shape[0])


def _pool(call: _Call) -> _Map:
    return _window(call, call.argument(2, None) or call.args[1])


def _batch_norm(call: _Call) -> _Map:
    if "no_training" not in call.name and call.args[5]:
        raise _Fixed("a batch norm uses the statistics of the batch")
    return call.map()


def _layer_norm(call: _Call) -> _Map:
    found = call.map()
    if not all(found.plain(-back) for back in range(1, len(call.args[1]) + 1)):
        raise _Fixed("a norm takes its statistics over positions")
    return found


def _product(call: _Call) -> _Map:
    """Of rows with a weight."""
    first = 1 if call.operator is aten.addmm else 0
    found = call.map(first)
    if id(call.args[first + 1]) in call.maps or not found.plain(1):
        raise _Fixed("a matrix product mixes positions")
    return _Map((found.dims[0], _plain(call.result.shape[1])), found.stride)


def _cat(call: _Call) -> _Map:
    maps = [call.maps.get(id(tensor)) for tensor in call.args[0]]
    first, dim = maps[0], call.argument(1, 0)
    if first is None or any(m is None or m.stride != first.stride for m in maps) or not first.plain(dim):
        raise _Fixed("cat joins something other than channels")
    return _sized(first, call.result)


def _permuted(call: _Call) -> _Map:
    found = call.map()
    return replace(found, dims=tuple(found.dims[dim] for dim in call.args[1]))


def _transposed(call: _Call) -> _Map:
    found = call.map()
    order = list(range(len(found.dims)))
    a, b = call.args[1:3] if len(call.args) > 2 else (0, 1)
    order[a], order[b] = order[b], order[a]
    return replace(found, dims=tuple(found.dims[dim] for dim in order))


def _viewed(call: _Call) -> _Map:
    """Dimensions are joined, and divided where neither samples nor positions are."""
    found = call.map()
    left = [part for dim in found.dims for part in dim if part.size > 1]
    dims: list[_Dim] = []
    for size in call.result.shape:
        parts: list[_Part] = []
        while math.prod(part.size for part in parts) < size:
            part, missing = left.pop(0), size // math.prod(p.size for p in parts)
            if part.size > missing and not part.name and part.size % missing == 0:
                left.insert(0, part._replace(size=part.size // missing))
                part = part._replace(size=missing)
            parts.append(part)
        if math.prod(part.size for part in parts) != size:
            raise _Fixed(f"{call.name} divides the map, into windows or patches")
        dims.append(tuple(parts) or _plain(1))
    return replace(found, dims=tuple(dims))


def _sliced(call: _Call) -> _Map:
    found, dim = call.map(), call.argument(1, 0)
    start, end, step = call.argument(2, None) or 0, call.argument(3, None), call.argument(4, 1)
    names = _names(found.dims[dim])
    if names not in ("", "y", "x") or (names and (start or (end is not None and end < call.args[0].shape[dim]))):
        raise _Fixed("a slice takes some of the positions")
    factors = (step if names == "y" else 1, step if names == "x" else 1)
    return replace(_sized(found, call.result), stride=(found.stride[0] * factors[0], found.stride[1] * factors[1]))


def _divided(call: _Call) -> _Map:
    dim = call.argument(2, 0)
    if not call.map().plain(dim):
        raise _Fixed(f"{call.name} takes some of the positions")
    return _sized(call.map(), tensors_in(call.result)[0])


def _reduced(call: _Call) -> _Map:
    """Of a sum or a mean over dimensions that are kept or not."""
    found, dims = call.map(), call.argument(1, None)
    dims = range(len(found.dims)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
    if not all(found.plain(dim) for dim in dims):
        raise _Fixed(f"{call.name} is taken over positions, all of which a moved image changes")
    over = {dim % len(found.dims) for dim in dims}
    if call.result.ndim == len(found.dims):
        return _sized(found, call.result)
    return replace(found, dims=tuple(dim for number, dim in enumerate(found.dims) if number not in over))


def _padded(call: _Call) -> _Map:
    found = call.map()
    changed = [n for n, size in enumerate(call.result.shape) if size != call.args[0].shape[n]]
    if any(_names(found.dims[n]) not in ("", "y", "x") for n in changed):
        raise _Fixed("rows and columns are padded together")
    return _sized(found, call.result)


def _same(call: _Call) -> _Map:
    found = call.map()
    if tuple(tensors_in(call.result)[0].shape) != tuple(call.args[0].shape):
        raise _Fixed(f"{call.name} repeats values")
    return found


def _softmax(call: _Call) -> _Map:
    if not call.map().plain(call.args[1]):
        raise _Fixed("a softmax is taken over positions")
    return call.map()


#: elementwise operators that torch does not tag so
_ELEMENTWISE = frozenset((aten.hardswish, aten.hardswish_, aten._prelu_kernel, aten.log_sigmoid_forward))
_RULES: dict[Any, Callable[[_Call], _Map]] = {
    aten.convolution: _convolution,
    **dict.fromkeys((aten.max_pool2d_with_indices, aten.avg_pool2d), _pool),
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training), _batch_norm),
    aten.native_layer_norm: _layer_norm,
    **dict.fromkeys((aten.mm, aten.addmm), _product),
    aten.cat: _cat,
    aten.permute: _permuted,
    **dict.fromkeys((aten.transpose, aten.t), _transposed),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze), _viewed),
    aten.slice: _sliced,
    **dict.fromkeys((aten.split, aten.split_with_sizes), _divided),
    **dict.fromkeys((aten.mean, aten.sum, aten.amax), _reduced),
    **dict.fromkeys((aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d), _padded),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.expand, aten.native_dropout), _same),
    aten._softmax: _softmax,
}
