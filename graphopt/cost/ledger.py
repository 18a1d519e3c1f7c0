"""Every storage of a training step, from the operator that allocates it to the moment it dies; and every contraction.

The ledger sits under autograd and above the kernels (a dispatch mode), so it sees each operator's results on fake tensors exactly
as on real ones. Storages are known by identity: views cost nothing, and a weak reference tells when the last one is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.cost.attribution import Attribution
from graphopt.cost.corrections import corrected
from graphopt.cost.flops import work


class Kind(IntEnum):
    """What a storage is for. What is nothing else is an activation: passing results and activations' gradients too."""

    ACTIVATION = 0
    PARAMETER = 1
    BUFFER = 2
    INPUT = 3
    OPTIMIZER = 4
    GRADIENT = 5
    SCRATCH = 6  # passing results of the optimizer's step


class _Watch(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("address", "index")

    address: int
    index: int


class _Saved:
    """What autograd keeps in place of a saved tensor: it is alive as long as autograd keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Ledger(TorchDispatchMode):
    """Use as a context around the step. Kinds are given with `set_kind`, before or after: peaks are computed from the events at the end."""

    def __init__(self, attribution: Attribution) -> None:
        super().__init__()
        self.attribution = attribution
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        #: of each storage: a function of parameters alone (a cast or mixed weight), which makes its products weight products.
        self.weights: list[bool] = []
        #: storage i allocated: i; dead: ~i.
        self.events: list[int] = []
        self.marks: list[tuple[str, int]] = []
        self.saved: list[tuple[weakref.ref[_Saved], int, str]] = []
        #: kernel calls, and the bytes of all that they read and write: what a step's time is made of besides FLOPs
        self.kernels = self.moved = 0
        self._watches: dict[int, _Watch] = {}
        self._open = True
        #: what a new storage is until told otherwise.
        self.default = Kind.ACTIVATION

    # -- storages

    def index(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is new from now on if it was not known."""
        return self._enter(tensor.untyped_storage())[0]

    def _enter(self, storage: torch.UntypedStorage) -> tuple[int, bool]:
        address = storage._cdata
        known = self._watches.get(address)
        if known is not None:
            return known.index, False
        watch = _Watch(storage, self._gone)
        watch.address, watch.index = address, len(self.sizes)
        self._watches[address] = watch
        self.sizes.append(storage.nbytes())
        self.kinds.append(self.default)
        self.weights.append(False)
        self.events.append(watch.index)
        return watch.index, True

    def _gone(self, watch: _Watch) -> None:
        if self._open and self._watches.pop(watch.address, None) is not None:
            self.events.append(~watch.index)

    def set_kind(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """What these tensors' storages are, from their allocation on. The first kind given to a storage stays."""
        for tensor in tensors:
            number = self.index(tensor)
            if self.kinds[number] in (Kind.ACTIVATION, Kind.SCRATCH):
                self.kinds[number] = kind
            if kind == Kind.PARAMETER:
                self.weights[number] = True

    def mark(self, phase: str) -> None:
        """A phase of the step starts here."""
        self.marks.append((phase, len(self.events)))

    def close(self) -> None:
        self._open = False
        self._watches.clear()

    # -- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = corrected(func.overloadpacket, args, func(*args, **kwargs))
        if func.namespace == "prim":  # a fake tensor asked for its device
            return out
        tensors = list(_flat(out))
        if self._open and not func.is_view:
            self.kernels += 1
            self.moved += sum(t.numel() * t.element_size() for t in (*_flat(args), *_flat(kwargs), *tensors))
        fresh = [self._enter(t.untyped_storage()) for t in tensors]
        weight: bool | None = None
        if any(new for _, new in fresh):
            weight = self._weights_only(args, kwargs)
            if weight:
                for number, new in fresh:
                    self.weights[number] |= new
        done = work(func.overloadpacket, args, kwargs, out)
        if done is not None:
            touches = any(self._is_weight(t) for t in (*_flat(args), *_flat(kwargs)))
            self.attribution.contraction(done.plain, done.weight, touches_weight=touches)
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        watch = self._watches.get(tensor.untyped_storage()._cdata)
        return watch is not None and self.weights[watch.index]

    def _weights_only(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        found = False
        for tensor in (*_flat(args), *_flat(kwargs)):
            watch = self._watches.get(tensor.untyped_storage()._cdata)
            if watch is None:
                return False
            if self.weights[watch.index]:
                found = True
            elif self.kinds[watch.index] != Kind.BUFFER:
                return False
        return found

    # -- saved tensors

    def pack(self, tensor: Tensor) -> _Saved:
        """`saved_tensors_hooks`' pack: notes who saves what, and keeps the tensor as autograd would have."""
        saved = _Saved(tensor)
        self.saved.append((weakref.ref(saved), self.index(tensor), self.attribution.path()))
        return saved

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor

    def saved_now(self) -> dict[str, int]:
        """Bytes by path of what autograd keeps at this moment: unique storages at the first path that saved each, the model's aside."""
        seen: set[int] = set()
        totals: dict[str, int] = {}
        for keeper, number, path in self.saved:
            if keeper() is not None and number not in seen and self.kinds[number] in (Kind.ACTIVATION, Kind.INPUT):
                seen.add(number)
                totals[path] = totals.get(path, 0) + self.sizes[number]
        return totals

    # -- results

    def peak(self, kinds: Iterable[Kind] = tuple(Kind), *, block: int = 1) -> tuple[int, int]:
        """(the most bytes of `kinds` live at once, the event that reaches it). The event is -1 where there never are any.

        With `block`, every storage counts as so many bytes or a multiple.
        """
        live = self.live(kinds, block=block)
        if not live.size:
            return 0, -1
        at = int(live.argmax())
        return int(live[at]), at

    def live(self, kinds: Iterable[Kind] = tuple(Kind), *, block: int = 1) -> np.ndarray:
        """Bytes of `kinds` that are live after each event."""
        return np.cumsum(self._changes(kinds, block))

    def live_at(self, event: int) -> dict[str, int]:
        """Bytes by kind after `event`."""
        return {kind.name.lower(): int(self._changes((kind,))[: event + 1].sum()) for kind in Kind}

    def phase_of(self, event: int) -> str:
        current = self.marks[0][0] if self.marks else ""
        for phase, start in self.marks:
            if event >= start:
                current = phase
        return current

    def _changes(self, kinds: Iterable[Kind], block: int = 1) -> np.ndarray:
        events = np.asarray(self.events, dtype=np.int64)
        numbers = np.where(events < 0, ~events, events)
        counted = np.isin(np.asarray(self.kinds, dtype=np.int64), [int(k) for k in kinds])
        sizes = -(-np.asarray(self.sizes, dtype=np.int64) // block) * block * counted
        return np.where(events < 0, -1, 1) * sizes[numbers] if events.size else np.zeros(0, dtype=np.int64)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat(item)
