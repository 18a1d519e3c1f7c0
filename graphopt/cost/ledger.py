"""Records every storage of a training step, from allocation to release, and the FLOPs of every operator.

The ledger is a dispatch mode, below autograd and above the kernels, so it sees each operator's results on fake tensors exactly as on real
ones. Storages are identified by address: views cost nothing, and a weak reference reports when a storage is freed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from graphopt.cost.attribution import Attribution
from graphopt.cost.figures import Work
from graphopt.cost.flops import CONVOLUTIONS, operator_flops
from graphopt.ir.fakes import FakeMode
from graphopt.ir.shapes import tensors_in

aten = torch.ops.aten


#: What a storage is for. Storages of no other kind count as activations: temporary results and gradients of activations too; SCRATCH are
#: temporary results of the optimizer's step; GATHERED are whole parameters, gathered from the shards of all ranks, and messages.
Kind = IntEnum("Kind", "ACTIVATION PARAMETER BUFFER INPUT OPTIMIZER GRADIENT SCRATCH GATHERED", start=0)


class _StorageRef(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, with its address and its number in the ledger."""

    address: int
    index: int


@dataclass(eq=False)
class _Saved:
    """What autograd stores in place of a saved tensor: it is alive as long as autograd needs it."""

    tensor: Tensor


class OperatorCall(NamedTuple):
    """An operator, with its arguments, its result, and the tensors among them."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    inputs: list[Tensor]
    outputs: list[Tensor]


class _Facts(NamedTuple):
    """What is known of an operator, which torch works out at each question."""

    namespace: str
    packet: Any
    computes: bool


@cache
def _facts(func: Any) -> _Facts:
    # A view is no work; an optimizer's step marks its beginning and its end for the profiler.
    return _Facts(func.namespace, func.overloadpacket, not func.is_view and func.namespace != "profiler")


def _tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, in order."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Ledger(TorchDispatchMode):
    """Use as a context around the step. `set_kind` may come before or after an allocation: peaks are computed at the end.

    Attributes:
        sizes, kinds: of each storage. default: the kind of a new storage.
        weights: whether a storage is a function of parameters alone (a cast or mixed weight): its products are products with a weight.
        events: storage i allocated: i; freed: ~i.
        phases: (name of a phase, number of events before it).
        saved: (stored tensor, storage, path that saved it).
        times: how often the work of the current phase counts, which may stand for others that are alike.
        kernels, moved: kernel calls, and the bytes of all that they read and write: what a step's time depends on besides FLOPs.
        products: FLOPs of matrix products and attention, but of no convolution.
        messages: the collectives that were called: (operator, bytes of the whole message, how often it counts).
        copies_scattered: whether a reduce-scatter works on a copy of its message, as gloo's does inside the operator.
        host: storages that stay on the CPU where the step runs on another device: the optimizer's counters.
        inside: is told each operator, to record what its kernel allocates for itself, and how long it takes on another device.
    """

    def __init__(self, attribution: Attribution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.attribution = attribution
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        self.default = Kind.ACTIVATION
        self.weights: list[bool] = []
        self.events: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self.saved: list[tuple[weakref.ref[_Saved], int, str]] = []
        self.times = 1
        self.kernels = self.moved = self.products = 0
        self.messages: list[tuple[str, int, int]] = []
        self.copies_scattered = False
        self.host: set[int] = set()
        self.inside: Callable[[OperatorCall], None] | None = None
        self._references: dict[int, _StorageRef] = {}
        self._open = True
        self._closed: tuple[np.ndarray, ...] | None = None
        self._below: FakeMode | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether each operator takes a detour to keep torch.compile away from this mode, as torch asks. Nothing is compiled under it."""
        return False

    def index(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, of a sharded one that of this rank's shard; an unknown storage gets one."""
        return self._register(getattr(tensor, "_local_tensor", tensor).untyped_storage())[0]

    def _register(self, storage: torch.UntypedStorage) -> tuple[int, bool]:
        """A storage's number, and whether it is new."""
        address = storage._cdata
        known = self._references.get(address)
        if known is not None:
            return known.index, False
        reference = _StorageRef(storage, self._freed)
        reference.address, reference.index = address, len(self.sizes)
        self._references[address] = reference
        self._append(storage.nbytes(), self.default)
        self.events.append(reference.index)
        return reference.index, True

    def _append(self, size: int, kind: int) -> None:
        self.sizes.append(size)
        self.kinds.append(kind)
        self.weights.append(False)

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_

        def watched(storage: Any, size: int) -> Any:
            return self._resized(storage, size)

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]  # sharded parameters are freed by it
        below = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        self._below = below if isinstance(below, FakeMode) and len(_get_current_dispatch_mode_stack()) == 1 else None
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # torch's own again
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's

    def _resized(self, storage: torch.UntypedStorage, size: int) -> Any:
        """Resizes a storage, which then counts as another one of the same kind."""
        result = self._resize(storage, size)
        known = self._references.get(storage._cdata)
        if known is None and size and self._open:
            self._register(storage)
        elif known is not None and self._open:
            self.events += [~known.index, len(self.sizes)]
            self._append(size, self.kinds[known.index])
            self.weights[-1] = self.weights[known.index]
            known.index = len(self.sizes) - 1
        return result

    def _freed(self, reference: _StorageRef) -> None:
        if self._open and self._references.pop(reference.address, None) is not None:
            self.events.append(~reference.index)

    def set_kind(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """What these tensors' storages are, from their allocation on. The first kind given to a storage stays."""
        for tensor in tensors:
            number = self.index(tensor)
            if self.kinds[number] in (Kind.ACTIVATION, Kind.SCRATCH):
                self.kinds[number] = kind
            if kind == Kind.PARAMETER:
                self.weights[number] = True

    def alive(self) -> frozenset[int]:
        """The storages that are there now."""
        return frozenset(reference.index for reference in self._references.values())

    def start_phase(self, name: str, times: int = 1) -> None:
        """A phase of the step starts here, whose work counts so many times."""
        self.times = times
        self.phases.append((name, len(self.events)))

    @property
    def work(self) -> Work:
        """All work so far."""
        return Work(sum(map(sum, self.attribution.totals.values())), self.moved, self.kernels, self.products)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, kernels are no work of the step; what they allocate counts."""
        before = self.moved, self.kernels
        try:
            yield
        finally:
            self.moved, self.kernels = before

    def close(self) -> None:
        """Records no more."""
        self._open = False
        self._references.clear()
        self._closed = self._arrays()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        # What is read of tensors here, and what a fake kernel calls, is not the step's: no function mode has to see it.
        with torch._C.DisableTorchFunction():
            return self._recorded(func, types, args, kwargs or {})

    def _recorded(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for kind in types:
            if kind.__name__ == "DTensor":  # importing the class loads much, for its name alone
                return NotImplemented  # the operator comes again, with the shards
        facts = _facts(func)
        if facts.namespace == "prim":  # a fake tensor asked for its device
            return args[0].fake_device if func is torch.ops.prim.device.default else func(*args, **kwargs)
        out = func(*args, **kwargs) if self._below is None else self._below.call_below(func, types, args, kwargs)
        if facts.packet in _DIFFERENT:
            out = _as_real(facts.packet, args, out)
        inputs, outputs = _tensors_of(args, kwargs), tensors_in(out)
        if self._open and facts.computes:
            self.kernels += self.times
            self.moved += self.times * sum([t.numel() * t.element_size() for t in (*inputs, *outputs)])
        registered = [self._register(t.untyped_storage()) for t in outputs]
        if facts.namespace in ("fsdp", "c10d"):
            self._gathered(func, args, kwargs, outputs)
        if self.inside is not None:
            self.inside(OperatorCall(func, args, kwargs, out, inputs, outputs))
        reads_weight = self._follow_weights(inputs, registered)
        flops = operator_flops(facts.packet, args, kwargs, out)
        if flops is not None:
            self.products += self.times * sum(flops) if facts.packet not in CONVOLUTIONS else 0
            self.attribution.add(self.times * flops.plain, self.times * flops.weight, reads_weight=reads_weight)
        return out

    def _follow_weights(self, inputs: list[Tensor], results: list[tuple[int, bool]]) -> bool:
        """Whether an operator reads a weight. Where it reads weights and buffers alone, its new results are weights, too."""
        read = [self._references.get(t.untyped_storage()._cdata) for t in inputs]
        numbers = [known.index for known in read if known is not None]
        weights = [self.weights[number] for number in numbers]
        if not any(weights):
            return False
        if len(numbers) == len(read) and all(w or self.kinds[n] == Kind.BUFFER for w, n in zip(weights, numbers, strict=True)):
            for number, new in results:
                self.weights[number] |= new
        return True

    def _gathered(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        """Records a collective, and which tensors hold whole parameters or messages."""
        if func.namespace == "fsdp":
            if func.overloadpacket.__name__ == "chunk_cat":
                self.set_kind(tensors_in(args[0]), Kind.GRADIENT)
            gathered = tensors_in(kwargs.get("out", [])) or outputs
        else:
            values = [tensors_in(value) for value in args]
            # The larger of input and output is the whole message: the other one may be a rank's share.
            whole = max(values, key=lambda tensors: sum(t.nbytes for t in tensors))
            name, size = func.overloadpacket.__name__, sum(t.nbytes for t in whole)
            if self.phases:
                self.messages.append((name, size, self.times))
            if self.copies_scattered and "scatter" in name:
                self.events += [len(self.sizes), ~len(self.sizes)]
                self._append(size, Kind.GATHERED)
            gathered = whole
        self.set_kind(gathered, Kind.GATHERED)

    def pack(self, tensor: Tensor) -> _Saved:
        """`saved_tensors_hooks`' pack: records who saves what, and holds the tensor as autograd would have."""
        saved = _Saved(tensor)
        self.saved.append((weakref.ref(saved), self.index(tensor), self.attribution.path()))
        return saved

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        """`saved_tensors_hooks`' unpack."""
        return saved.tensor

    def saved_now(self) -> dict[str, int]:
        """Bytes by path that autograd holds now: each storage once, at the first path that saved it; parameters and buffers left out."""
        seen: set[int] = set()
        totals: dict[str, int] = {}
        for reference, number, path in self.saved:
            if reference() is not None and number not in seen and self.kinds[number] in (Kind.ACTIVATION, Kind.INPUT):
                seen.add(number)
                totals[path] = totals.get(path, 0) + self.sizes[number]
        return totals

    def peak(self, kinds: Iterable[Kind] = tuple(Kind), *, block: int = 1) -> tuple[int, int]:
        """The most bytes of `kinds` that are live at once, sizes rounded up to multiples of `block`, and the event that reaches it."""
        live = self.live(kinds, block=block)
        at = int(live.argmax())
        return int(live[at]), at

    def live(self, kinds: Iterable[Kind] = tuple(Kind), *, block: int = 1) -> np.ndarray:
        """Bytes of `kinds` that are live after each event."""
        sizes, found, numbers, signs = self._arrays()
        sizes = -(-sizes // block) * block if block > 1 else sizes
        counted = sizes if len(asked := [int(kind) for kind in kinds]) == len(Kind) else sizes * np.isin(found, asked)
        return np.cumsum(signs * counted[numbers])

    def live_at(self, event: int) -> dict[str, int]:
        """Bytes by kind after `event`."""
        sizes, kinds, numbers, signs = self._arrays()
        numbers = numbers[: event + 1]
        changes, kinds = signs[: event + 1] * sizes[numbers], kinds[numbers]
        return {kind.name.lower(): int(changes[kinds == kind].sum()) for kind in Kind}

    def total(self, kind: Kind) -> int:
        """Bytes of all storages of a kind, whenever they were there."""
        sizes, kinds, _, _ = self._arrays()
        return int(sizes[kinds == kind].sum())

    def _arrays(self) -> tuple[np.ndarray, ...]:
        """Sizes and kinds of storages; of each event the number of its storage, and 1, or -1 where that is freed. Kept from `close` on."""
        if self._closed is not None:
            return self._closed
        sizes, kinds, events = (np.asarray(values, dtype=np.int64) for values in (self.sizes, self.kinds, self.events))
        freed = events < 0
        return sizes, kinds, np.where(freed, ~events, events), np.where(freed, -1, 1)

    def phase_of(self, event: int) -> str:
        """Name of the phase that an event belongs to."""
        return next((name for name, start in reversed(self.phases) if event >= start), self.phases[0][0])


_DIFFERENT = (
    *(aten.native_layer_norm_backward, aten.native_batch_norm, aten.native_batch_norm_backward),
    *(aten.native_group_norm, aten.native_group_norm_backward, aten.mse_loss),
)


def _as_real(packet: Any, args: tuple[Any, ...], out: Any) -> Any:
    """An operator's result with the layout and types that its real kernel gives it, where torch's fake kernel differs.

    Layout matters for memory: a non-contiguous result is copied by the next operator. Each case was found by `tools/coverage.py`, which
    compares every forecast with a real step on the CPU, and has no effect once torch is fixed.
    """
    if packet == aten.mse_loss:
        # Mean or sum of the kernel is a scalar in the memory of all squares, which it keeps (torch's `mse_loss`, resized).
        if not isinstance(out, FakeTensor) or out.dim() != 0 or (len(args) > 2 and args[2] == 0):
            return out
        return out.new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape)).as_strided((), ())
    if not isinstance(out[0], FakeTensor):
        return out
    if packet in (aten.native_group_norm, aten.native_group_norm_backward):
        # The kernel keeps the layout of its input; the fake one gives a contiguous result.
        layout = suggest_memory_format(args[packet == aten.native_group_norm_backward])
        return (out[0].contiguous(memory_format=layout), *out[1:])
    if packet == aten.native_batch_norm_backward:
        # The fake kernel makes a gradient of the input even where `output_mask`, the last argument, leaves it out.
        return (out[0] if args[-1][0] else None, *out[1:])
    if packet == aten.native_layer_norm_backward:
        # The kernel works on a contiguous copy of its input, and its gradient has that layout; the fake one keeps the input's strides.
        return (out[0].contiguous(), *out[1:])
    if any(t.dtype == torch.float32 != args[0].dtype for t in args[1:5] if t is not None):
        # A half-precision input with float32 parameters: the statistics are saved in float32, not in the input's type.
        return (out[0], *(t.float() for t in out[1:]))
    return out
