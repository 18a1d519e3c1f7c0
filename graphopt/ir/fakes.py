"""Fake CPU tensors, quickly: what an operator gave for tensors of the same shapes is not worked out again.

torch's own cache of results looks at every attribute that a tensor of any kind can have. Here a tensor is strided, real and on the CPU, so
shape, strides, offset and dtype tell what an operator makes of it; all others go torch's way.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_log = logging.getLogger("torch._subclasses.fake_tensor")
_CPU = torch.device("cpu")
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_DEVICE, _ITEM, _VIEW = torch.ops.prim.device.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.view.default
#: what an operator returns: new tensors or a view of its first argument, that argument itself, nothing, or anything else
_NEW, _FIRST, _NOTHING, _OTHER = "new", "first", "nothing", "other"
#: by operator; and whether it is a for-each operator
_kinds: dict[Any, tuple[str, bool]] = {}
#: from an operator and its described arguments to its described result, `_OTHER` where that cannot be described
_results: dict[Any, Any] = {}
MOST_RESULTS = 50_000


class _Undescribed(Exception):
    """A value that its description does not tell whole."""


@contextmanager
def unlogged() -> Iterator[None]:
    """Keeps torch from printing the traceback of an operator that does not take its fakes: the error that is raised says it."""
    before, _log.disabled = _log.disabled, True  # another level would make every logger of the process forget which of them speak
    try:
        yield
    finally:
        _log.disabled = before


class FakeMode(FakeTensorMode):
    """A `FakeTensorMode` that takes real tensors beside fakes, remembers the results of operators, and prints nothing."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._silenced: list[bool] = []
        # What torch would remember is remembered here.
        self.cache_enabled = False
        with unset_fake_temporarily():
            #: what torch notes on a fake CPU tensor of this mode
            self.notes = dict(vars(FakeTensor(self, torch.empty(0, device="meta"), _CPU)))

    def __enter__(self) -> Self:
        self._silenced.append(_log.disabled)
        _log.disabled = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            _log.disabled = self._silenced.pop()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether each operator takes a detour to keep torch.compile away from this mode, as torch asks. Nothing is compiled under it."""
        return False

    def call_below(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)` from the dispatch of the mode right above this one, without the way through torch's dispatcher."""
        torch._C._unset_dispatch_mode(_FAKE)
        try:
            return self.__torch_dispatch__(func, types, args, kwargs)
        finally:
            torch._C._set_dispatch_mode(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        kind, each = _kinds.get(func) or _kinds.setdefault(func, (_kind_of(func), func.name().startswith("aten::_foreach_")))
        if each and len(args[0]) > 1:
            return self._each(func, types, args, kwargs)
        if _of_constants(func, kind, args):
            # A counter of an optimizer, whose value torch keeps beside the fake.
            out = func(*_constants(args), **kwargs)
            return args[0] if kind is _FIRST else out
        key = self._key(func, args, kwargs) if kind is not _OTHER else None
        known = _results.get(key, _OTHER) if key is not None else _OTHER
        if known is not _OTHER:
            return args[0] if known is _FIRST else None if known is _NOTHING else self._made(known, args)
        if func is _VIEW and key is not None and (viewed := _contiguous_view(*args)) is not None:
            _results[key] = viewed
            return self._made(viewed, args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None and key not in _results and len(_results) < MOST_RESULTS:
            if kind is _NEW:
                _results[key] = _described_result(out, args, kwargs)
            else:  # it writes: what it wrote to must look as before
                same = self._key(func, args, kwargs) == key and out is (args[0] if kind is _FIRST else None)
                _results[key] = kind if same else _OTHER
        return out

    def _each(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A for-each operator, one tensor of its lists after the other: few of them differ in shape."""
        count = len(args[0])

        def at(value: Any, number: int) -> Any:
            return [value[number]] if isinstance(value, (list, tuple)) and len(value) == count else value

        found = [
            self.__torch_dispatch__(func, types, tuple(at(a, i) for a in args), {k: at(v, i) for k, v in kwargs.items()})
            for i in range(count)
        ]
        return None if found[0] is None else [one for (one,) in found]

    def _key(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the result depends on; None if that cannot be told."""
        try:
            key = (func, torch.get_default_dtype(), self._described(args), self._described(tuple(kwargs.items())))
            hash(key)
        except (_Undescribed, TypeError, RuntimeError):  # no strides, no hash
            return None
        return key

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if type(value) is not FakeTensor or value.fake_mode is not self or value.constant is not None or value.dtype.is_complex:
                raise _Undescribed
            return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        # Equal numbers of different types give results of different types.
        return (type(value), tuple(map(self._described, value)) if isinstance(value, (list, tuple)) else value)

    def _made(self, known: Any, args: Any) -> Any:
        kind, *parts = known
        if kind is Tensor:
            shape, strides, dtype, offset = parts
            return new_fake(self, shape, strides, dtype) if offset is None else self._view(args[0], shape, strides, dtype, offset)
        return None if kind is None else kind(self._made(part, args) for part in parts)

    def _view(self, base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, offset: int) -> FakeTensor:
        view = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        view.set_(base.untyped_storage(), offset, shape, strides)
        return _noted(self, view)


def new_fake(mode: FakeTensorMode, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> FakeTensor:
    """A new fake CPU tensor: what `mode` makes of an empty one, without the way through its dispatcher."""
    return _noted(mode, torch.empty_strided(shape, strides, dtype=dtype, device="meta"))


def _noted(mode: FakeTensorMode, elem: Tensor) -> FakeTensor:
    """`FakeTensor(mode, elem, cpu)` of a tensor on the meta device; in a `FakeMode` without setting each attribute anew."""
    if not isinstance(mode, FakeMode):
        return FakeTensor(mode, elem, _CPU)
    fake: FakeTensor = Tensor._make_subclass(FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=_CPU)
    torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
    vars(fake).update(mode.notes)
    return fake


def as_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake CPU tensor of the same shape, strides, dtype and kind; parameters on the meta device count as on the CPU."""
    with unset_fake_temporarily():
        fake = new_fake(mode, tensor.shape, tensor.stride(), tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            # What nn.Parameter makes of it, without a detour through the dispatcher.
            fake.requires_grad_(tensor.requires_grad)
            fake._is_param = True
    return fake


def _of_constants(func: Any, kind: str, args: Any) -> bool:
    """Whether an operator reads a number from tensors of known values alone, or changes nothing but the value of such a one."""
    if func is not _ITEM and kind not in (_FIRST, _NOTHING):
        return False
    found = list(_tensors(args))
    return bool(found) and all(getattr(tensor, "constant", None) is not None for tensor in found)


def _constants(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_constants, value))
    return value.constant if isinstance(value, FakeTensor) else value


def _contiguous_view(tensor: Tensor, sizes: Sequence[int]) -> Any:
    """The described result of a view of a tensor that lies in memory row by row; None for any other, or for sizes that do not fit it."""
    count = tensor.numel()
    if not count or tensor.stride() != _rows(tensor.shape):
        return None
    known = -prod(sizes) if -1 in sizes else prod(sizes)
    if known <= 0 or count % known or (-1 not in sizes and known != count):
        return None
    shape = tuple(count // known if size == -1 else size for size in sizes)
    return (Tensor, shape, _rows(shape), tensor.dtype, tensor.storage_offset())


def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that lies in memory row by row."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


def _kind_of(func: Any) -> str:
    if func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
        return _OTHER
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    if not any(written):
        return _NEW
    if not func._schema.returns:
        return _NOTHING
    return _FIRST if written[0] and not any(written[1:]) and len(func._schema.returns) == 1 else _OTHER


def _described_result(out: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Of new tensors, or of a view of the first argument."""
    base = args[0] if args and isinstance(args[0], Tensor) else None
    taken = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
    try:
        return _described_tensors(out, base, taken)
    except _Undescribed:
        return _OTHER


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _described_tensors(value: Any, base: Tensor | None, taken: set[int]) -> Any:
    """`taken` are storages that a new tensor is not in."""
    if value is None:
        return (None,)
    if isinstance(value, (list, tuple)):
        # torch's Python kernels of norms return named tuples, and plain ones from its own cache.
        return (list if isinstance(value, list) else tuple, *(_described_tensors(item, base, taken) for item in value))
    if type(value) is not FakeTensor or value.constant is not None or value.fake_device != _CPU or value.layout != torch.strided:
        raise _Undescribed
    storage, dtype = value.untyped_storage(), value.dtype
    description = (Tensor, tuple(value.shape), value.stride(), dtype)
    if dtype.is_complex or value is base:
        raise _Undescribed
    if base is not None and storage._cdata == base.untyped_storage()._cdata and dtype == base.dtype:
        return (*description, value.storage_offset())
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    if storage._cdata in taken or value.storage_offset() or storage.nbytes() != reach * value.element_size():
        raise _Undescribed
    taken.add(storage._cdata)
    return (*description, None)
